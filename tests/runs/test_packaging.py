"""Packaging: kernels/ is part of the package in a checkout, a wheel and an sdist; what the pages name exists."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fsdp_qlora.config.options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def python(code: str, *search: Path, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints, with `search` in front of its path."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_holds_the_kernels_by_a_symlink():
    link = ROOT / "fsdp_qlora" / "kernels"
    assert os.readlink(link) == os.path.join("..", "kernels")
    assert KERNELS
    for name in KERNELS:
        module = importlib.import_module(f"fsdp_qlora.kernels.{name}")
        assert module.__file__ == str(link / f"{name}.py")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_keeps_the_symlink():
    listed = subprocess.run(["git", "ls-files", "-s", "fsdp_qlora/kernels"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.startswith("120000 "), listed
    assert len(listed.stdout.splitlines()) == 1


def test_hugging_faces_package_of_the_same_name_is_not_shadowed(tmp_path):
    """Ours has no __init__.py, so that a package called `kernels` wins wherever it is on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = "import kernels, fsdp_qlora.kernels; print(kernels.theirs, len(list(fsdp_qlora.kernels.__path__)))"
    assert python(code, ROOT, tmp_path) == "True 1"


@pytest.mark.slow
def test_transformers_imports_from_the_checkout():
    """It looks for a package called kernels, and may find our folder: an empty name, none of whose files has run."""
    code = f"""
import sys
from transformers import LlamaForCausalLM
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print([file for file in files if file.startswith({str(ROOT / "kernels")!r})])
"""
    assert python(code, ROOT) == "[]"


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in_the_checkout", "elsewhere"])
def test_help_is_shown_wherever_it_is_asked_for(elsewhere, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command, cwd = ([ROOT / "train.py"], tmp_path) if elsewhere else (["train.py"], ROOT)
    shown = subprocess.run([sys.executable, *command, "--help"], cwd=cwd, env=environ, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--model_name" in shown.stdout


# ---- what is built. Each build has a copy of the sources, since building writes beside them.


def pip(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Return a copy of what a build reads, its symlink kept."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("build") / "sources"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fsdp_qlora", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def sdist(sources) -> Path:
    python("from setuptools.build_meta import build_sdist; build_sdist('../sdist')", cwd=sources)
    (archive,) = (sources.parent / "sdist").glob("*.tar.gz")
    return archive


def kernel_files(*search: Path, cwd: Path, before: str = "") -> set[Path]:
    """Return the files that every kernel is imported from, in a fresh interpreter that has run `before`."""
    code = f"""
{before}
import importlib
for name in {KERNELS!r}:
    print(importlib.import_module("fsdp_qlora.kernels." + name).__file__)
"""
    return set(map(Path, python(code, *search, cwd=cwd).splitlines()))


@pytest.mark.slow
def test_an_sdist_holds_the_kernels_as_files(sdist):
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
        for name in KERNELS:
            member = held[f"fsdp_qlora/kernels/{name}.py"]
            assert member.isreg()
            assert archive.extractfile(member).read() == (ROOT / "kernels" / f"{name}.py").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("made_from", ["checkout", "sdist"])
def test_a_wheel_carries_the_kernels_and_runs_without_the_checkout(made_from, request, tmp_path):
    pip("wheel", str(request.getfixturevalue({"checkout": "sources"}.get(made_from, made_from))), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "fsdp_qlora").rglob("*.py")}
    ours |= {f"fsdp_qlora/kernels/{name}.py" for name in KERNELS}
    held = {name for name in names if ".dist-info/" not in name}
    assert held == ours
    folder = site / "fsdp_qlora" / "kernels"
    assert not folder.is_symlink()
    assert kernel_files(site, cwd=tmp_path) == {folder / f"{name}.py" for name in KERNELS}


@pytest.mark.slow
def test_an_editable_install_reads_the_checkout(sources, tmp_path):
    pip("install", "--target", "site", "--editable", str(sources), cwd=tmp_path)
    # An editable install of the checkout itself, in the environment that the tests run in, would be asked first.
    before = f"""
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
site.addsitedir({str(tmp_path / "site")!r})
"""
    files = {file.resolve() for file in kernel_files(tmp_path / "site", cwd=tmp_path, before=before)}
    assert files == {sources / "kernels" / f"{name}.py" for name in KERNELS}


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
