"""Figures of docs/performance.md that come from recorded runs are theirs."""

import re

import pytest

from benchmarks import sweep, tables
from benchmarks.plan_grid import CASES, LONG

PAGE = tables.PAGE.read_text()
FOUND = [pytest.param(found[0], id=found[1]) for found in tables.MARKED.finditer(PAGE)]


@pytest.fixture
def line():
    """A line of the sweep that holds."""
    return next(row for row in tables.recorded("sweep") if sweep.holds(row))


@pytest.mark.parametrize("table", FOUND)
def test_a_table_is_that_of_the_recorded_rows(table):
    """Where this fails rows or the plan's arithmetic have changed: python -m benchmarks.tables"""
    assert tables.written(table) == table


def test_what_was_changed_in_a_table_by_hand_is_undone_and_text_stays():
    text, table, rest = "text\n", "<!-- table: home -->\n{}\n<!-- end -->", "\ntext"
    assert tables.written(text + table.format("| 9,999 |") + rest) == text + table.format(tables.home()) + rest


def test_each_table_is_on_the_page_once():
    assert sorted(tables.MARKED.findall(PAGE)) == sorted(tables.TABLES)


def test_each_row_that_the_text_names_can_be_run():
    known = CASES | LONG | sweep.settings()
    named = re.findall(r"`(\d+b[\w.-]*)(\*?)`", tables.MARKED.sub("", PAGE))
    assert len(named) > 10
    assert not [name for name, _ in named if not any(one.startswith(name) for one in known)]


def test_the_newest_line_of_a_setting_counts(line):
    older = line | {"run": line["run"] | {"commit": "0000000"}}
    table = sweep.table([older, line])
    assert "1 of 1 hold." in table
    assert "0000000" not in table


def test_a_line_of_copies_on_one_stream_is_none_of_the_table(line):
    assert "0 of 0 hold." in sweep.table([line | {"run": line["run"] | {"link": "single"}}])


@pytest.mark.parametrize(
    "changes",
    [
        {"failed": "SystemExit: train.py ended with 1"},
        {"run": {"retries_after_2": 1}},
        {"run": {"step_retries": 1}},
        {"measured": {"reserved_gib": 30.0}},
        {"measured": {"seconds": 9.0}},
    ],
)
def test_what_does_not_hold(line, changes):
    changed = {name: line[name] | part if isinstance(part, dict) else part for name, part in changes.items()}
    table = sweep.table([line | changed])
    assert "| no |" in table
    assert "0 of 1 hold." in table
