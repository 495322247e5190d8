"""Tiers of tests: a test is in the default tier, or in the one of its mark: gpu, ranks or slow."""

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.support.torchrun import start_torchrun

TIERS = ("gpu", "ranks", "slow")
COLLECTED = pytest.StashKey[list[pytest.Item]]()  # of a session: all tests, also those that -m or -k leaves out


def mark_ranks(items: list[pytest.Item]) -> None:
    """Mark each test that starts torchrun, itself or in a fixture, directly or through functions of our tests."""
    reaches: dict[object, bool] = {start_torchrun: True}
    for item in items:
        if any(_reaches_torchrun(function, reaches) for function in _functions_of(item)):
            item.add_marker(pytest.mark.ranks)


def tiers_of(item: pytest.Item) -> list[str]:
    """Return the tiers that a test is marked for: none for the default tier."""
    return [tier for tier in TIERS if item.get_closest_marker(tier)]


def some_slow(cases: Iterable[Any], every: int) -> list[Any]:
    """Return cases for `parametrize`, where many are alike: each `every`-th, from the first on, is of the default tier,
    the others are slow ones."""
    return [case if i % every == 0 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


def _functions_of(item: pytest.Item) -> Iterator[object]:
    if isinstance(item, pytest.Function):
        yield item.function
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            yield from (definition.func for definition in definitions)


def _reaches_torchrun(thing: object, known: dict[object, bool]) -> bool:
    if thing not in known:
        known[thing] = False  # of a function that calls itself, until the rest of it is read
        known[thing] = any(_reaches_torchrun(used, known) for used in _used_by(thing))
    return known[thing]


def _used_by(thing: object) -> Iterator[object]:
    """Yield the functions and classes of our tests that a function names, or that a class has."""
    if isinstance(thing, type):
        candidates = list(vars(thing).values())
    elif isinstance(thing, FunctionType):
        candidates = [thing.__globals__[name] for name in _names_in(thing.__code__) if name in thing.__globals__]
    else:
        return
    for candidate in candidates:
        candidate = inspect.unwrap(candidate) if callable(candidate) else candidate
        if isinstance(candidate, (type, FunctionType)) and candidate.__module__.startswith(("tests.", "test_")):
            yield candidate


def _names_in(code: CodeType) -> set[str]:
    """Return the global names and attributes in a function's code and in the functions defined in it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
