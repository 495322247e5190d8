"""The house: rooms import only rooms below them, by their doors; no circles; no file that holds two ideas."""

import ast
import graphlib
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from tests.support.torchrun import ROOT

PACKAGE = ROOT / "fsdp_qlora"
# From the ground up. What is in no room (run.py, session.py, inference.py, rig_plan.py) may import all of them but the
# commands, which in turn import it.
GROUND = ("atomic_files", "errors", "safetensors_header", "torch_compat", "units")
ROOMS = (
    "kernels", "config", "runtime", "distributed", "memory", "exchange", "data", "adapters", "weights", "models",
    "optim", "report", "plan", "placement", "generation", "export", "training", "commands",
)  # fmt: skip
ABOVE = ("session", "inference")  # what only commands import
MOST_NAMES = 8  # in a door
MOST_LINES, MEDIAN_LINES = 350, 150
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def module_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


@cache
def imports(path: Path, at_load: bool = False) -> list[tuple[str, ...]]:
    """Return the modules of this package that a file imports; at_load: only those that it needs to be imported."""
    tree, modules = ast.parse(path.read_text()), []
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("fsdp_qlora"):
            package = tuple(node.module.split(".")[1:])
            for name in node.names:
                inner = PACKAGE.joinpath(*package, name.name)
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                modules.append((*package, name.name) if is_module else package)
    return modules


def door(room: str) -> list[str]:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))


def test_every_file_is_in_a_room_or_known():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {
        "__init__",
        "__main__",
        *GROUND,
        "inference",
        "run",
        "rig_plan",
        "run_data",
        "session",
    }


@pytest.mark.parametrize("path", [*FILES, *KERNELS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_rooms_below_it(path):
    room = "kernels" if path in KERNELS else module_of(path)[0]
    if room not in ROOMS:
        assert room == "__main__" or not [module for module in imports(path) if module[0] == "commands"]
        return
    allowed = {*GROUND, *ROOMS[: ROOMS.index(room) + 1], *(ABOVE if room == ROOMS[-1] else ())}
    assert not [".".join(module) for module in imports(path) if module[0] not in allowed]


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "kernels"])
def test_other_rooms_enter_by_the_door(room):
    """A door is the list of modules that others may import."""
    public = door(room)
    assert len(public) <= MOST_NAMES
    entered = {
        module[1]
        for path in [*FILES, ROOT / "train.py"]
        if path.name == "train.py" or module_of(path)[0] != room
        for module in imports(path)
        if module[0] == room
    }
    assert entered == set(public)


def test_no_import_goes_in_a_circle():
    graph = {module_of(path): set(imports(path, at_load=True)) for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_file_holds_two_ideas():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in [*FILES, *KERNELS]}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
    assert median(count for name, count in lines.items() if not name.endswith("__init__.py")) <= MEDIAN_LINES
