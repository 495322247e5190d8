"""Compare the checkout's runs with the recorded ones, or with another commit's: `python -m tests.golden --help`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from tests.golden.cases import Record, run_all
from tests.golden.compare import RECORD, differences, environment_differences, recorded
from tests.golden.environment import environment
from tests.golden.origin import ROOT

RUNNER = "tests/golden/__main__.py"


class CannotCompareError(Exception):
    """There is nothing that could be compared; the message is one line for the user."""


def main(arguments: list[str] | None = None) -> int:
    """Do what was asked; return 0 where all bits are the same, 1 where not, 2 where they cannot be compared."""
    asked = _parse(arguments)
    try:
        if asked.record or asked.write:
            _save(_run_here(), asked.record or RECORD)
            return 0
        expected = _run_commit(asked.against) if asked.against else _recorded_here()
        return _report(differences(expected, _run_here()))
    except CannotCompareError as error:
        print(f"tests.golden: {error}", file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help=f"record the checkout's runs in {RECORD.name}")
    choice.add_argument("--record", type=Path, metavar="FILE", help="record the checkout's runs in FILE")
    choice.add_argument("--against", metavar="COMMIT", help="compare with the runs of COMMIT on this machine")
    return parser.parse_args(arguments)


def _run_here() -> Record:
    """Train all cases of this checkout and tell how long it took. Raises CannotCompareError where one fails."""
    disable_progress_bar()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="golden_") as folder:
        try:
            record = run_all(Path(folder))
        except (AssertionError, RuntimeError) as error:  # an AssertionError of a launch that outlives its time
            raise CannotCompareError(f"the cases do not run\n{error}") from error
    print(f"{len(record['cases'])} cases trained in {time.monotonic() - start:.0f} s", flush=True)
    return record


def _save(record: Record, file: Path) -> None:
    file.write_text(json.dumps(record, indent=1) + "\n")


def _recorded_here() -> Record:
    """Return the record kept with the code. Raises CannotCompareError where another environment made it."""
    if not RECORD.is_file():
        raise CannotCompareError(f"no {RECORD.name}: record it with --write")
    record = recorded()
    others = environment_differences(record["environment"], environment())
    if others:
        raise CannotCompareError(
            f"{RECORD.name} is another environment's, whose bits are not this one's ({'; '.join(others)}): compare "
            "with a commit's runs here, --against COMMIT"
        )
    return record


def _run_commit(commit: str) -> Record:
    """Train all cases of `commit`, with its own code, in a checkout of its own; return their record."""
    if _git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise CannotCompareError(f"there is no commit {commit}")
    if _git("cat-file", "-e", f"{commit}:{RUNNER}").returncode:
        raise CannotCompareError(f"commit {commit} has no {RUNNER}, so it has no cases to run")
    with tempfile.TemporaryDirectory(prefix="golden_") as folder, _worktree(commit, Path(folder) / "checkout") as root:
        file = Path(folder) / "runs.json"
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "tests.golden", "--record", str(file)]
        print(f"{commit}: ", end="", flush=True)
        if subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": path}, check=False).returncode:
            raise CannotCompareError(f"the cases of commit {commit} do not run")
        return json.loads(file.read_text())


@contextmanager
def _worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check `commit` out into `folder`, for as long as the context lasts."""
    made = _git("worktree", "add", "--detach", str(folder), commit)
    if made.returncode:
        raise CannotCompareError(f"git worktree: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def _report(lines: list[str]) -> int:
    for line in lines:
        print(line)
    print(f"{len(lines)} differences" if lines else "all the same to the last bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
