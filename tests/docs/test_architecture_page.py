"""The page on the architecture has the rooms in the order in which they import one another, with their doors' words."""

import ast
import re

import pytest

from tests.support.torchrun import ROOT
from tests.test_architecture import ROOMS

PAGE = (ROOT / "docs" / "architecture.md").read_text()
LINES = dict(re.findall(r"^\| `(\w+)/` \| (.+) \|$", PAGE, re.MULTILINE))


def test_the_rooms_are_in_import_order():
    assert tuple(LINES) == ROOMS


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "kernels"])
def test_a_room_is_described_as_its_door_does(room):
    door = ast.parse((ROOT / "fsdp_qlora" / room / "__init__.py").read_text())
    assert LINES[room] == " ".join((ast.get_docstring(door) or "").split())
