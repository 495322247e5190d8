"""The command report where folders and files are not what it needs: one line, at once, and nothing is left behind."""

import os
from pathlib import Path

import pytest

from fsdp_qlora.__main__ import main
from tests.support.run_folders import write_run


def told(capsys: pytest.CaptureFixture[str], *given: object) -> str:
    """Return the one line that the command says of a mistake."""
    assert main(["report", *map(str, given)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


def test_a_folder_that_cannot_be_entered_is_no_traceback(tmp_path, capsys):
    run = write_run(tmp_path / "run", 3)
    (tmp_path / "loop").symlink_to("loop")
    for folder, why in (
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "loop", "Too many levels of symbolic"),
    ):
        assert f"output_dir: {folder} cannot be read ({why}" in told(capsys, "--output_dir", folder)
        line = told(capsys, "--output_dir", run, "--evaluation_dir", folder)
        assert f"evaluation_dir: {folder} cannot be read ({why}" in line
    (tmp_path / "link").symlink_to(run)
    assert main(["report", "--output_dir", str(tmp_path / "link")]) == 0
    assert (run / "report.html").exists()


def test_what_is_no_regular_file_is_not_read(tmp_path, capsys):
    """A pipe without a writer would be waited for."""
    run, pipe = write_run(tmp_path / "run", 3), tmp_path / "pipe"
    os.mkfifo(pipe)
    for file in (pipe, tmp_path):
        line = told(capsys, "--output_dir", run, "--output_file", file)
        assert f"output_file: {file} exists and is no report" in line


def test_a_run_on_a_disk_that_cannot_be_written_is_told_to_take_another_file(tmp_path, capsys, monkeypatch):
    run, touch = write_run(tmp_path / "run", 3), Path.touch

    def read_only(self: Path, *arguments: object, **more: object) -> None:
        if self.parent == run:
            raise OSError(30, "Read-only file system")
        touch(self, *arguments, **more)

    monkeypatch.setattr(Path, "touch", read_only)
    line = told(capsys, "--output_dir", run)
    assert f"output_file: {run / 'report.html'} cannot be written (Read-only file system); give one that can" in line
    assert main(["report", "--output_dir", str(run), "--output_file", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").exists()


def test_where_there_is_no_run_no_folder_is_made(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    told(capsys, "--output_dir", tmp_path / "empty", "--output_file", tmp_path / "new" / "page.html")
    assert not (tmp_path / "new").exists()
