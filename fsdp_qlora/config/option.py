"""One option: described once in its dataclass field; the text that a user wrote becomes its value."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

NOT_BUILT = "is known but not built yet"  # in messages about values and options of features to come
REQUIRED: Any = object()  # the default of an option that has none

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NULL_WORDS = ("null", "none")

Raw = str | list[str] | None  # a value as written: text, a list of texts, or null


@dataclass(frozen=True)
class Spec:
    """Meaning, unit, limits and other names of an option: all that the dataclass field's type does not say."""

    meaning: str
    why: str  # the reason of the default
    price: str = ""  # what choosing a larger, or the other, value costs or buys; empty: nothing worth naming
    unit: str = ""
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    choices: Sequence[Any] = ()  # the allowed values, where they come from a table and not from a Literal
    special: Mapping[int, str] = field(default_factory=dict)  # values outside the range, and what they mean
    aliases: Mapping[str, str] = field(default_factory=dict)  # another spelling of an allowed value -> the value
    refused: Mapping[object, str] = field(default_factory=dict)  # a value whose feature is not built -> what to do
    is_path: bool = False  # has ~ and $VARIABLE as a shell takes them, which has not seen a file or what follows `=`
    known_as: Sequence[str] = ()  # what other programs call it: only for "did you mean"
    check: Callable[[str], object] | None = None  # reads a text that has a form; raises ValueError where it has not


def option(default: Any, meaning: str, why: str, price: str = "", **limits: Any) -> Any:
    """Return a dataclass field with its `Spec`; `limits` are Spec's other fields. Texts may be wrapped at will."""
    meaning, why, price = (" ".join(text.split()) for text in (meaning, why, price))
    metadata = {"spec": Spec(meaning, why, price, **limits)}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def as_in(group: type, name: str) -> Any:
    """Return the dataclass field of an option that `group` has, for another dataclass: the same in all."""
    given = next(item for item in dataclasses.fields(group) if item.name == name)
    if given.default_factory is not dataclasses.MISSING:
        return field(default_factory=given.default_factory, metadata=given.metadata)
    return field(default=given.default, metadata=given.metadata)


def nearest(word: str, words: Sequence[str], cutoff: float = 0.6) -> str | None:
    """Return the one of `words` that `word` most likely meant, or None: at least as alike as `cutoff`, of 1."""
    close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=cutoff)
    return close[0] if close else None


def show(value: Any) -> str:
    """Return a value as a user writes it."""
    if isinstance(value, list):
        return ",".join(map(show, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Option:
    """An option as parser, help and documentation see it: the field's name, type and default with its Spec."""

    name: str
    group: str  # the attribute of Config that holds it
    kind: type  # str, int, float or bool: of the value, or of each item where `many`
    many: bool
    nullable: bool
    choices: tuple[Any, ...]  # empty: anything of the kind
    default: Any  # REQUIRED where there is none
    spec: Spec

    def allowed(self) -> str:
        """Return the allowed values, in words."""
        spec = self.spec
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[self.kind]
        words += f" of {spec.unit}" if spec.unit else ""
        if self.choices:
            listed = ", ".join(str(choice) for choice in self.choices)
            words = listed if len(self.choices) == 1 else f"one of {listed}"
            words = f"a list of {listed}" if self.many else words
        elif self.many:
            words = f"a list of {'names' if self.kind is str else 'numbers'}, comma-separated"
        ranges = ((spec.above, "above"), (spec.at_least, "at least"), (spec.at_most, "at most"), (spec.below, "below"))
        limits = [f"{label} {limit:.10g}" for limit, label in ranges if math.isfinite(limit)]
        words += ((", " if spec.unit else " ") if limits else "") + " and ".join(limits)
        words += "".join(f", or {value} ({meaning})" for value, meaning in spec.special.items())
        return words + (", or null" if self.nullable else "")

    def read(self, raw: Raw) -> Any:
        """Return the value that `raw` means. Raises ValueError with what is wrong, what is allowed and what to do."""
        if isinstance(raw, str):
            raw = raw.strip()  # a block of YAML's ends with a line break
        if raw is None:
            if self.nullable:
                return None
            raise ValueError(f"null is not a value; give {self.allowed()}")
        if not self.many:
            if isinstance(raw, list):
                raise ValueError(f"takes one value, not a list; give {self.allowed()}")
            return self._read_one(raw)
        values, wrong = [], []
        for item in raw if isinstance(raw, list) else raw.split(","):
            try:
                values.append(self._read_one(item.strip()))
            except ValueError as error:
                wrong.append(str(error))
        if not values and not wrong:
            wrong.append(f"the list is empty; give {self.allowed()}")
        if len(set(values)) < len(values):
            wrong.append("the list names something twice; name each once")
        if wrong:
            raise ValueError("; ".join(wrong))
        return values

    def _read_one(self, text: str) -> Any:
        if self.spec.check is not None:
            self.spec.check(text)
        value = self.spec.aliases.get(text, self._convert(text))
        if self.spec.is_path:
            value = ",".join(map(_as_in_a_shell, value.split(",")))
        if value in self.spec.refused:
            raise ValueError(self.spec.refused[value])
        if self.choices and value not in self.choices:
            near = nearest(text, [*map(str, self.choices), *self.spec.aliases])
            raise ValueError(self._bad(text, near))
        if self.kind in (int, float) and not self.choices and value not in self.spec.special:
            spec = self.spec
            # written so that NaN and the infinities are outside of every range
            if not (spec.at_least <= value <= spec.at_most and spec.above < value < spec.below):
                raise ValueError(f"{text} is out of range; give {self.allowed()}")
        return value

    def _convert(self, text: str) -> Any:
        if not text:
            raise ValueError(f"needs a value; give {self.allowed()}")
        if self.kind is bool:
            if text.lower() in TRUE_WORDS + FALSE_WORDS:
                return text.lower() in TRUE_WORDS
            raise ValueError(self._bad(text))
        try:
            whole = re.fullmatch(r"([+-]?\d+)\.0*", text) if self.kind is int else None
            return self.kind(whole[1] if whole else text)
        except ValueError:
            raise ValueError(self._bad(text)) from None

    def _bad(self, text: str, near: str | None = None) -> str:
        meant = f"; did you mean {near}?" if near else ";"
        return f"{text!r} is not allowed{meant} give {self.allowed()}"


def _as_in_a_shell(path: str) -> str:
    """Return a path with the user's home for a beginning ~, and with the environment's values. Raises ValueError."""
    path = os.path.expanduser(path)
    expanded = os.path.expandvars(path)
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset and not os.path.exists(path):
        raise ValueError(f"{unset[0]} is not set in the environment; set it, or write the path itself")
    return path if os.path.exists(path) else expanded


def options_of(group: str, group_class: type) -> list[Option]:
    """Return the options of one dataclass whose fields were made by `option`, in order."""
    hints = typing.get_type_hints(group_class)
    found = []
    for item in dataclasses.fields(group_class):
        hint, nullable, many = hints[item.name], False, False
        choices: tuple[Any, ...] = tuple(item.metadata["spec"].choices)
        if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None; the latter of a Literal
            nullable, hint = True, next(part for part in typing.get_args(hint) if part is not type(None))
        if typing.get_origin(hint) is list:
            many, hint = True, typing.get_args(hint)[0]
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            hint = type(choices[0])
        default = REQUIRED if item.default is dataclasses.MISSING else item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        found.append(Option(item.name, group, hint, many, nullable, choices, default, item.metadata["spec"]))
    return found
