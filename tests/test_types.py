"""Annotations of kernels/: complete in every function but those that Triton compiles.

mypy asks for annotations in every other package. In this one it cannot, since it does not tell the two kinds apart.
"""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).resolve().parent.parent / "kernels").glob("*.py"))


def functions(file: Path) -> list[ast.FunctionDef]:
    """Return the functions and methods of a file that run on the host."""
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    return [node for node in found if "triton.jit" not in map(ast.unparse, node.decorator_list)]


def unannotated(function: ast.FunctionDef) -> list[str]:
    """Return the names of what lacks an annotation: parameters, and "return"."""
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    missing = [one.arg for one in parameters if one.annotation is None and one.arg != "self"]
    return missing if function.returns is not None else [*missing, "return"]


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_every_host_function_of_the_kernels_is_annotated(file):
    missing = {f"{node.name}, line {node.lineno}": names for node in functions(file) if (names := unannotated(node))}
    assert not missing


def test_a_missing_annotation_is_found(tmp_path):
    file = tmp_path / "kernel.py"
    file.write_text("@triton.jit\ndef device(x, N): ...\ndef host(x: int, *rest, out) -> None: ...\ndef bare(): ...\n")
    assert [unannotated(function) for function in functions(file)] == [["out", "rest"], ["return"]]


def test_kernels_are_looked_for():
    assert any(functions(file) for file in KERNELS)
