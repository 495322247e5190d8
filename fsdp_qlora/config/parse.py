"""Flags and a config file become a checked Config; every mistake in them is found before the first is reported."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fsdp_qlora.config.compat import COMPATIBILITY
from fsdp_qlora.config.files import Given, read_file
from fsdp_qlora.config.hints import HINTS
from fsdp_qlora.config.misnamed import did_you_mean, meant_by
from fsdp_qlora.config.option import NULL_WORDS, REQUIRED, Option, options_of, show
from fsdp_qlora.config.options import GROUPS, OPTIONS, Config
from fsdp_qlora.config.program import Asked, Conflict, Needs, Program, broken
from fsdp_qlora.config.rules import broken_rules
from fsdp_qlora.errors import UserError

Own = TypeVar("Own")
CONFIG = "config"
# An option written with one hyphen, or with the dash that a word processor makes of two.
ONE_DASH = re.compile("[-\u2013\u2014]([A-Za-z][\\w-]*)(=.*)?", re.DOTALL)


TRAIN = Program(
    "torchrun --nproc_per_node GPUS train.py --model_name MODEL [--config FILE] [--option value ...]",
    """Fine-tunes a causal language model with LoRA over a frozen base, in 4 bits by default, divided among the GPUs.
    Without torchrun, `python train.py ...` runs one process.""",
    GROUPS, OPTIONS, Config.from_flat, broken_rules, COMPATIBILITY, HINTS,
)  # fmt: skip


def beside_training(
    usage: str,
    intro: str,
    kind: type[Own],
    needs: Collection[Needs[tuple[Own, Config]]] = (),
    conflicts: Collection[Conflict[tuple[Own, Config]]] = (),
) -> Program[tuple[Own, Config]]:
    """Return the program that takes the fields of `kind` and all options of train.py, with the rules of both.

    A name that both have is one option, described by `kind`; both get its value."""
    own = {item.name: item for item in options_of("command", kind)}
    theirs = {name: item for name, item in OPTIONS.items() if name not in own}

    def make(values: Mapping[str, Any]) -> tuple[Own, Config]:
        shared = {name: value for name, value in values.items() if name in OPTIONS}
        return kind(**{name: value for name, value in values.items() if name in own}), Config.from_flat(shared)

    def rules(
        asked: tuple[Own, Config], given: Collection[str], unknown: Collection[str], written: Callable[[str], str]
    ) -> Iterator[str]:
        yield from TRAIN.rules(asked[1], given, unknown, written)
        values = asked[1].to_flat() | dataclasses.asdict(asked[0])  # type: ignore[call-overload]
        yield from broken(asked, values, needs, conflicts, given, unknown, written)

    return Program(usage, intro, {"command": kind, **GROUPS}, {**own, **theirs}, make, rules, COMPATIBILITY, HINTS)


def parse(argv: Sequence[str]) -> Config:
    """Return the Config that train.py's `argv` (without the program's name) asks for, as `parse_as` does."""
    return parse_as(TRAIN, argv)


def parse_record(file: str) -> Config:
    """Return the Config that a run wrote down. It ran, so the rules between options, which change, are not asked again.

    Raises UserError for values and options that are not known now."""
    return parse_as(replace(TRAIN, rules=lambda *_: iter(())), ["--config", file])


def parse_as(program: Program[Asked], argv: Sequence[str]) -> Asked:
    """Return what `argv` asks of a program: defaults, then --config's file, then flags.

    Raises UserError that holds all mistakes, one a line, each with what was written, what is allowed and what to do.
    """
    flags, mistakes = read_flags(argv, program.known)
    in_file: list[Given] = []
    lost = False  # of a file that cannot be read nothing is known, not even that it lacks a required option
    for flag in flags:
        if flag.name == CONFIG:
            in_file, wrong = read_file(str(flag.raw))
            mistakes += wrong
            lost = bool(wrong) and not in_file
    in_file, wrong = _once(in_file)
    asked, mistaken = _resolve(program, in_file, [flag for flag in flags if flag.name != CONFIG], lost)
    mistakes += wrong + mistaken
    if mistakes:
        raise UserError("\n".join(" ".join(mistake.split()) for mistake in mistakes))
    return asked


def read_flags(argv: Sequence[str], known: Mapping[str, Option]) -> tuple[list[Given], list[str]]:
    """Return (flags with values, mistakes of form). A lone flag is true or lacks a value.

    No value begins as an option does, unless it is written --name=value."""
    given, mistakes, rest = [], [], list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            mistakes.append(_stray(token, rest, known))
            continue
        flag, equals, text = token.partition("=")
        name = flag[2:].replace("-", "_")
        option = known.get(name)
        takes_many = not equals and (option.many if option else name != CONFIG)
        values = [text] if equals else _values_of(rest, takes_many)
        raw: str | None = ",".join(values)
        if option and not values and option.kind is bool:
            raw = "true"
        if option and option.nullable and raw is not None and raw.lower() in NULL_WORDS:
            raw = None
        given.append(Given(name, raw, " ".join([flag, *values])))
    once, twice = _once(given)
    return once, mistakes + twice


def _values_of(rest: list[str], takes_many: bool) -> list[str]:
    """Take the values that follow an option off `rest`: one, or all up to the next option."""
    values: list[str] = []
    while rest and (takes_many or not values) and not (rest[0].startswith("--") or ONE_DASH.fullmatch(rest[0])):
        values.append(rest.pop(0))
    return values


def _stray(token: str, rest: list[str], known: Mapping[str, Option]) -> str:
    """Return the mistake of a token that is neither an option nor a value; what follows `-option` goes with it."""
    hint, dashed = "", ONE_DASH.fullmatch(token)
    if dashed is not None:
        token = " ".join([token, *_values_of(rest, takes_many=True)])
        name = dashed[1].replace("-", "_")
        hint = f"; did you mean --{name}?" if name in known else ""
    elif token.endswith((".yaml", ".yml", ".json")):
        hint = f"; did you mean --config {token}?"
    return f"{token}: belongs to no option; options are written --name value{hint}"


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether --help is among the arguments: it is shown in spite of mistakes."""
    return any(token in ("-h", "--help") for token in argv)


def _once(given: Iterable[Given]) -> tuple[list[Given], list[str]]:
    """Return `given` with each name as first given, and a mistake for each repetition."""
    seen: dict[str, Given] = {}
    mistakes = []
    for item in given:
        first = seen.setdefault(item.name, item)
        if first is not item:
            mistakes.append(f"{item.written}: {item.name} is given twice (before: {first.written}); give it once")
    return list(seen.values()), mistakes


def _resolve(
    program: Program[Asked], in_file: Iterable[Given], flags: Iterable[Given], file_is_lost: bool
) -> tuple[Asked, list[str]]:
    """Return what the program makes of the values that can be read, and the mistakes in all of them."""
    known = program.known
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    unread: set[str] = set()
    misnamed: set[str] = set()
    mistakes = []
    for item in [*in_file, *flags]:
        if item.name not in known:
            meant = meant_by(program, item.name)
            misnamed.update(meant)
            mistakes.append(f"{item.written}: there is no such option; {did_you_mean(program, item, meant)}")
            continue
        written[item.name] = item.written
        unread.discard(item.name)
        try:
            values[item.name] = known[item.name].read(item.raw)
        except ValueError as error:
            mistakes.append(f"{item.written}: {error}")
            unread.add(item.name)
    for name, option in program.options.items():
        if option.default is REQUIRED and name not in values:
            if name not in unread | misnamed and not file_is_lost:
                mistakes.append(f"{name}: is required and not given; add --{name}. {option.spec.meaning}")
            unread.add(name)
            values[name] = ""
    asked = program.make({name: value for name, value in values.items() if name in program.options})

    def shown(name: str) -> str:
        return written.get(name) or f"{name} {show(program.options[name].default)} (its default)"

    mistakes += program.rules(asked, values.keys(), unread, shown)
    return asked, mistakes
