"""Files and code names that a Markdown page mentions, and whether they exist; reads the sources, imports nothing."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.torchrun import ROOT

PACKAGE = ROOT / "fsdp_qlora"
# config.yaml, plan.json: files that a run reads or writes, no modules
DATA_FILES = ("csv", "gguf", "html", "jinja", "json", "jsonl", "parquet", "png", "pth", "tsv", "txt", "yaml", "yml")
_PATH = re.compile(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|sh|toml)(?![\w/])")
_DOTTED = re.compile(r"(?<![\w./-])[a-z]\w*(?:\.\w+)+")


def missing_files(page: str) -> list[str]:
    """Return the .py, .sh and .toml files that a page names and that are neither in the repository nor the package."""
    named = dict.fromkeys(_PATH.findall(_without_python(page)))
    return [path for path in named if not ((ROOT / path).exists() or (PACKAGE / path).exists())]


def missing_names(page: str) -> list[str]:
    """Return the code names, `room.module.name`, of backticks and plain diagrams that no module of ours defines."""
    text = _without_python(page)
    diagrams = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    named = dict.fromkeys(name for part in [*diagrams, *spans] for name in _DOTTED.findall(part))
    return [name for name in named if _is_ours(name) and not exists(name)]


def exists(name: str) -> bool:
    """Tell whether `room.module`, or `room.module.name` with any members after it, is defined in the package."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = PACKAGE.joinpath(*parts[:length])
        file = module.with_suffix(".py") if module.with_suffix(".py").exists() else module / "__init__.py"
        if file.exists():
            return _has(_parsed(file).body, parts[length:])
    return PACKAGE.joinpath(*parts).is_dir()


def _is_ours(name: str) -> bool:
    first, *_, last = name.split(".")
    ours = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists()
    return ours and last not in DATA_FILES and not name.endswith(".py")


def _without_python(page: str) -> str:
    return re.sub(r"^```python\n.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _has(body: list[ast.stmt], parts: list[str]) -> bool:
    if not parts:
        return True
    for node in body:
        if parts[0] in _defined(node):
            return len(parts) == 1 or (isinstance(node, ast.ClassDef) and _has(node.body, parts[1:]))
    attributes = {name for node in body if isinstance(node, ast.FunctionDef) for name in _set_on_self(node)}
    return len(parts) == 1 and parts[0] in attributes


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name))


def _set_on_self(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
