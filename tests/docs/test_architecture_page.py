"""The page on the architecture has the rooms in the order in which they import one another, with their doors' words."""

import ast
import re

import pytest

from tests.support.torchrun import ROOT
from tests.test_architecture import GROUND, ROOMS

PAGE = (ROOT / "docs" / "architecture.md").read_text()
LINES = dict(re.findall(r"^\| `(\w+)/` \| (.+) \|$", PAGE, re.MULTILINE))


def test_the_rooms_are_in_import_order():
    assert tuple(LINES) == ROOMS


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "kernels"])
def test_a_room_is_described_as_its_door_does(room):
    door = ast.parse((ROOT / "fsdp_qlora" / room / "__init__.py").read_text())
    assert LINES[room] == " ".join((ast.get_docstring(door) or "").split())


def test_what_is_below_and_above_the_rooms_is_named():
    above = [path.stem for path in (ROOT / "fsdp_qlora").glob("*.py") if path.stem not in ("__init__", *GROUND)]
    assert not [name for name in [*GROUND, *above] if f"`{name}.py`" not in PAGE]
