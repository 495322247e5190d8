"""Tiers: each test is in one of them, so that the default one, ranks, slow and gpu are all tests together."""

import re

import pytest

from tests.support.tiers import COLLECTED, TIERS, mark_ranks, tiers_of
from tests.support.torchrun import ROOT, run_torchrun


@pytest.fixture
def launched():
    return _launch()


class _Launches:
    def __getitem__(self, name):
        return _launch()


def _launch():
    return run_torchrun("print()")


def test_each_test_is_in_one_tier(request):
    several = {item.nodeid: tiers_of(item) for item in request.config.stash[COLLECTED] if len(tiers_of(item)) > 1}
    assert not several, "a test that starts ranks needs no other mark"


def test_the_script_leaves_out_all_other_tiers_or_none():
    script = (ROOT / "launch" / "test.sh").read_text()
    assert re.search(r'^tier=\(-m "(.*)"\)$', script, re.M)[1] == " and ".join(f"not {tier}" for tier in TIERS)
    assert "\n    tier=()\n" in script
    assert "launch/test.sh --all" in (ROOT / ".ci" / "run").read_text()


def test_the_tiers_are_declared(request):
    declared = {line.partition(":")[0] for line in request.config.getini("markers")}
    assert set(TIERS) <= declared


def names_itself():
    run_torchrun("print()")


def names_a_helper():
    return [_launch() for _ in range(1)]


def names_a_class():
    return _Launches()["run"]


def asks_for_a_fixture(launched):
    return launched


def names_nothing():
    return names_nothing, re.compile


@pytest.mark.parametrize("function", [names_itself, names_a_helper, names_a_class, asks_for_a_fixture])
def test_a_test_that_starts_ranks_is_marked(function, request):
    item = pytest.Function.from_parent(request.node.parent, name="test_ranks", callobj=function)
    mark_ranks([item])
    assert tiers_of(item) == ["ranks"]


def test_a_test_that_starts_none_is_not_marked(request):
    item = pytest.Function.from_parent(request.node.parent, name="test_alone", callobj=names_nothing)
    mark_ranks([item])
    assert not tiers_of(item)
