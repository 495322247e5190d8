"""Packaging: the door to kernels/ opens from a checkout and a wheel, shadows nobody, and what the pages name exists."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fsdp_qlora.config import OPTIONS

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def python(code: str, *search: Path, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints, with `search` in front of its path."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_kernel_is_behind_the_door():
    assert KERNELS
    for name in KERNELS:
        module = importlib.import_module(f"fsdp_qlora.kernels.{name}")
        assert module.__file__ == str(ROOT / "kernels" / f"{name}.py")


def test_hugging_faces_package_of_the_same_name_is_not_shadowed(tmp_path):
    """Ours has no __init__.py, so that a package called `kernels` wins wherever it is on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = "import kernels, fsdp_qlora.kernels; print(kernels.theirs, len(list(fsdp_qlora.kernels.__path__)))"
    assert python(code, ROOT, tmp_path) == "True 1"


def test_transformers_imports_from_the_checkout():
    """It looks for a package called kernels, and may find our folder: an empty name, none of whose files has run."""
    code = f"""
import sys
from transformers import LlamaForCausalLM
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print([file for file in files if file.startswith({str(ROOT / "kernels")!r})])
"""
    assert python(code, ROOT) == "[]"


def test_a_wheel_carries_the_kernels_and_runs_without_the_checkout(tmp_path):
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools
    source = tmp_path / "source"  # building writes beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fsdp_qlora", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    done = subprocess.run([*build, "./source"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"fsdp_qlora/kernels/{name}.py" for name in KERNELS} <= names
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "fsdp_qlora").rglob("*.py")}
    assert ours <= names, f"left out: {ours - names}"
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"fsdp_qlora"}
    code = f"import fsdp_qlora.kernels.{KERNELS[0]} as kernel; print(kernel.__file__)"
    assert python(code, tmp_path / "site", cwd=tmp_path).startswith(str(tmp_path / "site"))


def commands(document: Path) -> list[str]:
    """The shell lines of a Markdown page, continuation lines joined."""
    blocks = re.findall(r"```(?:bash|sh|console|shell)?\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_the_readmes_first_screen_has_both_set_up_commands():
    first_screen = (ROOT / "README.md").read_text().splitlines()[:50]
    assert any("bash launch/test.sh" in line for line in first_screen)
    assert any("bash launch/quickstart.sh" in line for line in first_screen)
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_what_a_page_tells_to_run_exists(page):
    told = commands(ROOT / page)
    for command in told:
        for path in re.findall(r"(?<![\w/.])(?:(?:launch|configs|benchmarks|tests)/[\w./-]+\.\w+|train\.py)", command):
            assert (ROOT / path).exists(), f"{page}: `{command}` names {path}, which is not there"
        if "train.py" in command:
            flags = re.findall(r"--([\w-]+)", command.split("train.py", 1)[1])
            unknown = {flag.replace("-", "_") for flag in flags} - set(OPTIONS) - {"config", "help"}
            assert not unknown, f"{page}: `{command}` has options that do not exist: {unknown}"
    assert told or page != "README.md"


@pytest.mark.parametrize(
    "script", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])
)
def test_scripts_parse_and_stop_at_the_first_failure(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    assert "set -euo pipefail" in (ROOT / script).read_text()
