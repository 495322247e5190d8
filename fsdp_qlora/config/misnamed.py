"""Names that are no option's: which options they may mean, and what to write in their place."""

import re
from collections.abc import Sequence

from fsdp_qlora.config.files import Given
from fsdp_qlora.config.option import nearest
from fsdp_qlora.config.program import Asked, Program

CLOSE = 0.72  # how alike an unknown name must be to be taken for a misspelling; below it a hint leads astray
SHORTENED = 3  # options that begin alike: of more, an abbreviation may mean any


def meant_by(program: Program[Asked], name: str) -> list[str]:
    """Return the options that a name which is none may mean: its synonym, the one it resembles, those it begins."""
    synonyms = _synonyms(program)
    if name in synonyms:
        return [synonyms[name]]
    if name in program.hints or _negated(program, name):
        return []
    near = nearest(name, list(synonyms), CLOSE)
    if near:
        return [synonyms[near]]
    begun = [option for option in program.options if option.startswith(name)]
    return begun if len(begun) <= SHORTENED else []


def did_you_mean(program: Program[Asked], item: Given, meant: Sequence[str]) -> str:
    """Return what to do about an option that is none. meant: its `meant_by`."""
    if item.name in program.hints and not meant:
        return program.hints[item.name]
    negated = _negated(program, item.name)
    if negated is not None:
        return f"use {negated}"
    if not meant:
        return "--help lists all"
    hint = f"did you mean {' or '.join(meant)}?"
    try:
        program.known[meant[0]].read(item.raw)
    except ValueError:
        return hint if len(meant) > 1 or not item.raw else f"{hint} It takes {program.known[meant[0]].allowed()}"
    return hint


def _negated(program: Program[Asked], name: str) -> str | None:
    """Return how to write what argparse calls `--no_option`, None for another name."""
    found = re.fullmatch("no_?(.+)", name)
    option = program.known.get(_synonyms(program).get(found[1], "")) if found else None
    if option is None:
        return None
    if option.kind is bool or "false" in option.choices:
        return f"--{option.name} false"
    return f"--{option.name} null" if option.nullable else None


def _synonyms(program: Program[Asked]) -> dict[str, str]:
    """Return {what an option is called, here or in other programs: its name}."""
    return {alias: option.name for option in program.known.values() for alias in (option.name, *option.spec.known_as)}
