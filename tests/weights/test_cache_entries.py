"""The cache's entries: what is one, what removes it, what disk it may be on; a user's own files stay."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fsdp_qlora.weights.base_cache import disk, names, part
from fsdp_qlora.weights.base_cache.entry import Note, entries, mark_used, remove, write_note
from fsdp_qlora.weights.base_cache.part import sweep
from fsdp_qlora.weights.base_cache.tidy import remove_replaced, remove_unused

ENCODERS = {"device": "NVIDIA H100", "torch": "2.13.0", "bitsandbytes": "0.49.0"}
NOTE = Note("llama", "nf4", 3, 1e9, "/models/llama", "here", "first", "units", ENCODERS)


def made(folder: Path, name: str, note: Note | None) -> Path:
    path = folder / (name * 32)
    path.mkdir(parents=True)
    if note is not None:
        write_note(path, note)
    (path / f"{'f' * 32}{names.SUFFIX}").write_bytes(bytes(100))
    return path


def test_entries_of_earlier_bytes_of_a_checkpoint_are_removed_and_no_others(tmp_path):
    old = made(tmp_path, "a", NOTE)
    stays = [
        made(tmp_path, "b", replace(NOTE, codec="other", content="second")),  # of the same bytes as the new one
        made(tmp_path, "c", replace(NOTE, source="/models/other", content="o")),
        made(tmp_path, "d", replace(NOTE, host="there", content="o")),
        tmp_path / "mine",
    ]
    stays[-1].mkdir()
    (line,) = remove_replaced(tmp_path / ("e" * 32), replace(NOTE, content="second"))
    assert line == "base_cache: removed, as /models/llama has changed since: 0.0 GiB of llama in nf4"
    assert not old.exists()
    assert all(path.exists() for path in stays)
    assert remove_replaced(tmp_path / ("e" * 32), replace(NOTE, content="second")) == []


@pytest.mark.parametrize(
    ("change", "goes"),
    [
        ({"torch": "2.9.1+cu128"}, True),
        ({"bitsandbytes": "0.48.2"}, True),
        ({"torch": "2.14.0"}, False),  # of a newer environment, which goes on using it
        ({"torch": "2.12.0", "bitsandbytes": "0.50.0"}, False),
        ({"device": "NVIDIA RTX 4090", "torch": "2.12.0"}, False),  # of a card that shares the home
        ({"hqq": "0.1"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_an_entry_of_older_encoders_of_the_same_device_is_replaced(change, goes, tmp_path):
    other = made(tmp_path, "a", replace(NOTE, encoders=ENCODERS | change))
    units = made(tmp_path, "b", replace(NOTE, encoders=ENCODERS | change, layout="other units"))
    lines = remove_replaced(tmp_path / ("e" * 32), NOTE)
    assert (not other.exists(), len(lines)) == (goes, int(goes))
    assert units.exists()


def age(path: Path, seconds: float = 1e9) -> None:
    for file in [*path.iterdir(), path]:
        os.utime(file, (seconds, seconds))


def test_entries_that_no_run_has_used_for_long_go(tmp_path):
    old, new, own, shared = (made(tmp_path, name, NOTE) for name in "abcd")
    for path in (old, own, shared):
        age(path)
    (shared / f"{names.USED}12345").touch()  # another user's run
    assert remove_unused(tmp_path, own) == (
        "base_cache: removed, as no run has used it for 30 days: 0.0 GiB of llama in nf4"
    )
    assert [found.folder for found in entries(tmp_path)] == [new, own, shared]
    assert remove_unused(tmp_path, new).count("llama") == 1, "the run's own stays, however old"
    mark_used(shared)
    assert (shared / f"{names.USED}{os.getuid()}").exists()


def test_a_folder_that_is_not_the_caches_is_no_entry_and_stays(tmp_path):
    """A user's folder of such a name, one beside whose files are ours, a link to one, an empty one."""
    theirs, empty = tmp_path / ("a" * 32), tmp_path / ("b" * 32)
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    (theirs / f"{'f' * 32}{names.SUFFIX}").write_text("mine too")
    empty.mkdir()
    elsewhere = made(tmp_path / "elsewhere", "c", NOTE)
    (tmp_path / ("c" * 32)).symlink_to(elsewhere)
    for path in (theirs, empty, elsewhere):
        age(path)
    assert not list(entries(tmp_path))
    assert remove_unused(tmp_path, tmp_path / ("d" * 32)) == ""
    assert len(list(theirs.iterdir())) == 2
    assert empty.exists()
    assert (tmp_path / ("c" * 32)).is_symlink()
    assert len(list(elsewhere.iterdir())) == 2


def test_files_that_are_not_ours_stay_when_an_entry_is_removed(tmp_path):
    path = made(tmp_path, "a", NOTE)
    (path / "notes.txt").write_text("mine")
    (path / "mine.safetensors").write_text("mine")
    (path / "folder").mkdir()
    (found,) = entries(tmp_path)
    assert remove(found) == 3
    assert {file.name for file in path.iterdir()} == {"notes.txt", "mine.safetensors", "folder"}
    assert not list(entries(tmp_path)), "what is left is no entry any more"


def test_every_file_of_an_entry_counts_and_parts_of_killed_runs_are_swept_in_all(tmp_path):
    path = made(tmp_path, "a", NOTE)
    before = next(entries(tmp_path)).nbytes
    left, file = part.make_part(path)
    os.write(file, bytes(5000))
    assert next(entries(tmp_path)).nbytes == before + 5000
    remove_unused(tmp_path, tmp_path / ("d" * 32))
    assert left.exists(), "its writer lives"
    os.close(file)
    remove_unused(tmp_path, tmp_path / ("d" * 32))
    assert not left.exists()
    assert next(entries(tmp_path)).nbytes == before


def test_an_entry_whose_note_is_damaged_is_listed_all_the_same(tmp_path):
    path = made(tmp_path, "a", NOTE)
    text = json.dumps({"model": "x"})[:-3]
    (path / names.NOTE).write_text(text)
    (found,) = entries(tmp_path)
    assert (found.note.model, found.nbytes, found.units) == ("unknown", 100 + len(text), 1)
    shutil.rmtree(path)
    assert not list(entries(tmp_path))


def test_a_part_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Between the file's beginning and its lock another run's sweep takes it for a killed run's."""
    flock, swept = part.fcntl.flock, []

    def sweeping(file: int, how: int) -> None:
        if not swept:
            swept.append(True)
            sweep(tmp_path)
        flock(file, how)

    monkeypatch.setattr(part.fcntl, "flock", sweeping)
    path, file = part.make_part(tmp_path)
    assert swept
    assert part.is_still(path, file)
    assert list(tmp_path.iterdir()) == [path]
    os.close(file)


@pytest.mark.parametrize("old", [False, True])
def test_a_part_of_another_host_is_left_alone_for_a_day(old, tmp_path):
    """A network mount's locks may be each host's own."""
    theirs = tmp_path / f"{names.PART}another.host-77-{'0' * 16}"
    theirs.touch()
    if old:
        os.utime(theirs, (1e9, 1e9))
    sweep(tmp_path)
    assert theirs.exists() != old


MOUNTS = """/dev/sda / ext4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
server:/home {home} nfs4 rw 0 0
/dev/sdb {home}/local\\040disk xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind", "unfit"),
    [("", "nfs4", "network mount"), ("local disk/of/mine", "xfs", ""), ("local", "nfs4", "network mount")],
)
def test_the_kind_of_a_disk_is_that_of_the_innermost_mount(folder, kind, unfit, tmp_path, monkeypatch):
    (tmp_path / "local disk").mkdir()
    read_text = Path.read_text
    mounts, read_text = MOUNTS.format(home=tmp_path), Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: mounts if self.name == "mounts" else read_text(self, **how)
    )
    assert disk.kind_of_disk(tmp_path / folder) == kind
    assert unfit in disk.unfit_by_default(tmp_path / folder)
    assert bool(unfit) == bool(disk.unfit_by_default(tmp_path / folder))


@pytest.mark.parametrize("kind", ["nfs", "lustre", "fuse.sshfs", "cifs", "tmpfs", "9p"])
def test_no_base_is_kept_by_default_where_it_would_be_anothers_disk_or_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "kind_of_disk", lambda folder: kind)
    assert kind in disk.unfit_by_default(tmp_path)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "overlay", "fuseblk", "fuse.fuse-overlayfs", ""])
def test_a_base_is_kept_by_default_on_disks_of_this_machine(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "kind_of_disk", lambda folder: kind)
    assert disk.unfit_by_default(tmp_path) == ""


def test_what_a_run_still_writes_on_the_same_disk_is_left_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(total=1000, used=700, free=300)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    owed = disk.Owed(tmp_path, 199)
    assert disk.lack_of_room(tmp_path, 200) == ""
    assert "would fill the disk" in disk.lack_of_room(tmp_path, 201)
    assert disk.lack_of_room(tmp_path, 2) == ""
    line = disk.lack_of_room(tmp_path, 2, owed)
    assert "adapter and checkpoints may take would fill the disk" in line
    assert disk.lack_of_room(tmp_path, 2, disk.Owed(tmp_path / "of another node", owed.nbytes)) == ""


@pytest.mark.parametrize(("nbytes", "fits"), [(100, True), (101, False)])
def test_a_hundredth_of_what_a_nearly_full_disk_has_free_fills_none(nbytes, fits, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(total=1_000_000, used=990_000, free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert (disk.lack_of_room(tmp_path, nbytes) == "") == fits


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOENT, "was removed while it was written to"),
        (errno.EACCES, "this user cannot write to"),
        (errno.EROFS, "this user cannot write to"),
        (errno.EDQUOT, "has no room"),
        (errno.ENOSPC, "has no room"),
        (errno.ENOTDIR, "set a folder"),
        (errno.EIO, "look at the disk"),
    ],
)
def test_a_refusal_says_why(number, says, tmp_path):
    line = disk.refusal(tmp_path, OSError(number, os.strerror(number)))
    assert says in line
    assert "\n" not in line


def test_a_disk_that_has_refused_is_asked_again_once_it_has_more_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    disk.note_full(tmp_path, OSError(errno.ENOSPC, "No space left on device"), 10_000)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: usage._replace(free=disk.noted_full(tmp_path).free + 9_999)
    )
    assert "refused it on" in disk.still_full(tmp_path)
    assert "cache clear" in disk.still_full(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**18))
    assert disk.still_full(tmp_path) == ""
    assert not list(tmp_path.iterdir())
    disk.note_full(tmp_path, OSError(errno.EDQUOT, "Disk quota exceeded"), 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**19))
    assert "quota" in disk.still_full(tmp_path), "a quota is not seen in what the disk has free"
