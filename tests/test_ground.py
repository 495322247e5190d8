"""What every room may import: sizes in words, files written whole or not at all."""

import os
import subprocess

import pytest

from fsdp_qlora.atomic_files import atomic_file, sweep
from fsdp_qlora.units import GIB, as_gib, count_of


def test_sizes_in_gib():
    assert as_gib(22.94 * GIB) == "22.9 GiB"
    assert as_gib(GIB / 8, 2) == "0.12 GiB"
    assert as_gib(64 * GIB, 0) == "64 GiB"


def test_numbers_with_their_words():
    assert [count_of(n, "row") for n in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with atomic_file(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail() -> None:
        with atomic_file(target) as part:
            part.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_file_may_be_read_by_whom_the_users_mask_allows(tmp_path):
    plain, private = tmp_path / "plain", tmp_path / "private"
    plain.touch()
    with atomic_file(private) as part:
        part.write_text("")
        part.chmod(0o600)
    assert private.stat().st_mode == plain.stat().st_mode


def test_parts_of_killed_processes_are_swept_and_nothing_else(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    ours = tmp_path / f".model.gguf.{gone.pid}"
    others = [
        tmp_path / name for name in (f".model.gguf.{os.getpid()}", f".another.{gone.pid}", ".model.gguf", "model.1")
    ]
    for file in (ours, *others):
        file.write_bytes(b"half")
    sweep(tmp_path, lambda name: name == "model.gguf", dead_only=True)
    assert not ours.exists()
    assert all(file.exists() for file in others)
    sweep(tmp_path, lambda name: name == "model.gguf", dead_only=False)
    assert [file.exists() for file in others] == [False, True, True, True]
