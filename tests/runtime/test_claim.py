"""The output folder: one run at a time, from the moment it is checked, however the run before it ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora.errors import UserError
from fsdp_qlora.runtime.files import LOCK, Claim
from tests.support.torchrun import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from fsdp_qlora.runtime.files import Claim
claim = Claim()
claim.take(Path(sys.argv[1]), True)
print("taken", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_another_run_has_taken_is_refused_even_to_overwrite(tmp_path: Path, overwrite: bool) -> None:
    process = hold(tmp_path / "out")
    try:
        with Claim() as claim, pytest.raises(UserError, match=rf"is taken by another run \(process {process.pid} on"):
            claim.take(tmp_path / "out", overwrite)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "out" / LOCK).exists(), "a killed run leaves its file"
    with Claim() as claim:
        claim.take(tmp_path / "out", False)  # which is nobody's and nothing
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_is_given_back_and_what_was_in_it_is_untouched(tmp_path: Path) -> None:
    for _ in range(2):
        with Claim() as claim:
            claim.take(tmp_path, False)
            with Claim() as other, pytest.raises(UserError, match="is taken by another run"):
                other.take(tmp_path, False)
    (tmp_path / "mine").write_text("x")
    with Claim() as claim, pytest.raises(UserError, match="is not empty"):
        claim.take(tmp_path, False)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
