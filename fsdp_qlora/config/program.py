"""A program's options as a table: what its flags and files may say, what is made of them, the rules between them."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fsdp_qlora.config.option import Option, options_of

Asked = TypeVar("Asked")
Rules = Callable[[Asked, Collection[str], Collection[str], Callable[[str], str]], Iterator[str]]


@dataclass(frozen=True)
class Needs(Generic[Asked]):
    """`options` do nothing unless `holds`; what decides is the option `decider`, to be set as `remedy` says."""

    options: tuple[str, ...]
    decider: str
    holds: Callable[[Asked], bool]
    remedy: str


@dataclass(frozen=True)
class Conflict(Generic[Asked]):
    """`options` cannot go together while `broken`; the text says why and what to do."""

    options: tuple[str, ...]
    broken: Callable[[Asked], bool]
    text: str


@dataclass(frozen=True)
class Program(Generic[Asked]):
    """A program as parser and help see it.

    groups: title's owner (a dataclass) by the group that its options name. make: {option: value} -> what the program
    takes; values of `compatibility` do not reach it. rules: yields one line for each broken rule; its arguments are
    what was made, the options given, those whose value could not be read, and option -> how the user wrote it.
    hints: an unknown name -> what to do in its place.
    """

    usage: str
    intro: str
    groups: Mapping[str, type]
    options: Mapping[str, Option]
    make: Callable[[Mapping[str, Any]], Asked]
    rules: Rules[Asked]
    compatibility: Mapping[str, Option] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, Option]:
        return {**self.options, **self.compatibility}


def command(
    usage: str,
    intro: str,
    kind: type[Asked],
    needs: Collection[Needs[Asked]] = (),
    conflicts: Collection[Conflict[Asked]] = (),
) -> Program[Asked]:
    """Return the program whose options are the fields of one dataclass, with the rules between them."""
    options = {item.name: item for item in options_of("command", kind)}

    def rules(
        asked: Asked, given: Collection[str], unknown: Collection[str], written: Callable[[str], str]
    ) -> Iterator[str]:
        values = dataclasses.asdict(asked)  # type: ignore[call-overload]
        yield from broken(asked, values, needs, conflicts, given, unknown, written)

    return Program(usage, intro, {"command": kind}, options, lambda values: kind(**values), rules)


def unmet(asked: Asked, values: Mapping[str, Any], needs: Collection[Needs[Asked]]) -> dict[str, Needs[Asked]]:
    """Return {option: the rule} of options that do nothing and ask for something (not false, not null)."""
    rules = [rule for rule in needs if not rule.holds(asked)]
    # By identity: 0 is False's equal, and asks for something.
    return {n: rule for rule in rules for n in rule.options if values[n] is not False and values[n] is not None}


def broken(
    asked: Asked,
    values: Mapping[str, Any],
    needs: Collection[Needs[Asked]],
    conflicts: Collection[Conflict[Asked]],
    given: Collection[str],
    unknown: Collection[str],
    written: Callable[[str], str],
) -> Iterator[str]:
    """Yield one line for each broken rule. values: of all options. The rest as `Program.rules` takes it."""
    for name, rule in unmet(asked, values, needs).items():
        if name in given and not {name, rule.decider} & set(unknown):
            yield f"{written(name)}: has no effect with {written(rule.decider)}; omit {name}, or {rule.remedy}"
    for conflict in conflicts:
        if not set(conflict.options) & set(unknown) and conflict.broken(asked):
            yield f"{' with '.join(map(written, conflict.options))}: {conflict.text}"
