"""The cache's files: what was written comes back in any part and to any address, and what is damaged is found out."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.memory.pinned import large_pages
from fsdp_qlora.weights.base_cache import unit_file
from fsdp_qlora.weights.base_cache.kept import UnitKey
from fsdp_qlora.weights.base_cache.lanes import Lanes, results
from fsdp_qlora.weights.base_cache.part import sweep
from fsdp_qlora.weights.base_cache.unit_file import BLOCK, Damaged, Reading, Writing, read_contents
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.codecs import NF4, Plain
from fsdp_qlora.weights.frozen_bytes import checksum
from fsdp_qlora.weights.layout import Layout
from tests.support.torchrun import ROOT

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
DOUBLE = NF4(double_quant=True)
PIECE = 3 * BLOCK  # a piece in these tests
NBYTES = 7 * PIECE + 5 * 256  # the last piece is short, and no multiple of what a disk reads


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    for module in ("unit_file", "lanes"):
        monkeypatch.setattr(f"fsdp_qlora.weights.base_cache.{module}.PIECE", PIECE)


@pytest.fixture
def whole() -> Tensor:
    return torch.randint(256, (NBYTES,), dtype=torch.uint8).to(DEVICE)


@pytest.fixture
def path(whole, tmp_path) -> Path:
    with Lanes(3, DEVICE) as lanes:
        writing = Writing(tmp_path / "unit.safetensors", "block", "digest", NBYTES, checksum(whole))
        lanes.store(writing, whole, NBYTES)
        assert not writing_done(tmp_path), "a file has its name once it is whole"
        assert writing.finish() == (tmp_path / "unit.safetensors").stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["unit.safetensors"]
    return tmp_path / "unit.safetensors"


def writing_done(folder: Path) -> bool:
    return (folder / "unit.safetensors").exists()


def read(path: Path, memory: Tensor, start: int) -> Tensor:
    reading = Reading(path, read_contents(path, "digest"))
    try:
        with Lanes(3, DEVICE) as lanes:
            results(lanes.fetch(reading, memory, start))
    finally:
        reading.close()
    return memory


@pytest.mark.parametrize("in_memory", [False, True], ids=["from-the-disk", "in-the-systems-memory"])
@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0, NBYTES), (0, NBYTES + 1024), (0, PIECE), (PIECE, 2 * PIECE), (256, PIECE), (PIECE - 256, 512),
        (3 * PIECE + 512, 3 * PIECE), (NBYTES - 256, 1024), (NBYTES, 512), (NBYTES + 256, 256), (PIECE, 0),
    ],
)  # fmt: skip
def test_every_part_of_a_unit_comes_back(start, length, in_memory, whole, path, monkeypatch):
    """To memory on the pages that a disk writes into and to any other; zeros after its tensors."""
    monkeypatch.setattr(unit_file, "IN_MEMORY", -1.0 if in_memory else 2.0)
    expected = torch.cat([whole, whole.new_zeros(2048)])[start : start + length]
    places = [torch.full((length + 64,), 7, dtype=torch.uint8, device=DEVICE)[32 : 32 + length]]
    if length:
        places.append(large_pages(length).fill_(7))
    for memory in places:
        assert torch.equal(read(path, memory, start).to(DEVICE), expected)


def test_a_file_is_one_that_safetensors_opens(whole, path):
    found = load_file(path)["bytes"]
    assert torch.equal(found[:NBYTES], whole.cpu())
    assert not found[NBYTES:].any()
    assert read_contents(path, "digest").total == checksum(whole)


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_one_flipped_bit_of_the_header_is_found(path):
    before = path.read_bytes()
    for position in range(BLOCK):
        flip(path, position, position % 8)
        with pytest.raises(Damaged, match="header is damaged"):
            read_contents(path, "digest")
        flip(path, position, position % 8)
    assert path.read_bytes() == before
    read_contents(path, "digest")
    with pytest.raises(Damaged):
        read_contents(path, "another unit's")


@pytest.mark.parametrize("position", [0, PIECE - 1, PIECE, 3 * PIECE + 77, NBYTES - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_of_the_bytes_is_found(position, bit, path):
    flip(path, BLOCK + position, bit)
    with pytest.raises(Damaged, match=f"from {position // PIECE * PIECE} on are not those that were written"):
        read(path, torch.empty(NBYTES, dtype=torch.uint8), 0)


def test_pages_that_changed_places_are_found_though_the_sum_is_the_same(path, whole):
    data = bytearray(path.read_bytes())
    one, two = slice(BLOCK, 2 * BLOCK), slice(2 * BLOCK, 3 * BLOCK)
    data[one], data[two] = data[two], data[one]
    path.write_bytes(data)
    found = load_file(path)["bytes"][:NBYTES]
    assert not torch.equal(found, whole.cpu())
    assert checksum(found) == checksum(whole)
    with pytest.raises(Damaged, match="not those that were written"):
        read(path, torch.empty(NBYTES, dtype=torch.uint8), 0)


@pytest.mark.parametrize("left", [0, 5, BLOCK - 1, BLOCK, BLOCK + PIECE, -1])
def test_a_truncated_file_is_found_before_it_is_read(left, path):
    data = path.read_bytes()
    path.write_bytes(data[:left])
    with pytest.raises(Damaged):
        read_contents(path, "digest")
    path.write_bytes(data + b"\0")
    with pytest.raises(Damaged, match="in place of"):
        read_contents(path, "digest")


def test_a_file_that_shrinks_while_it_is_read_is_found(path):
    reading = Reading(path, read_contents(path, "digest"))
    os.truncate(path, BLOCK + 2 * PIECE)
    with Lanes(3, DEVICE) as lanes, pytest.raises(Damaged, match="cut short"):
        results(lanes.fetch(reading, torch.empty(NBYTES, dtype=torch.uint8), 0))
    reading.close()


def test_a_full_disk_leaves_no_file(whole, tmp_path, monkeypatch):
    def full(file: int, memory: memoryview, offset: int) -> int:
        if offset > 3 * PIECE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, memory, offset)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    writing = Writing(tmp_path / "unit.safetensors", "block", "digest", NBYTES, checksum(whole))
    with Lanes(3, DEVICE) as lanes, pytest.raises(OSError, match="No space left"):
        lanes.store(writing, whole, NBYTES)
    writing.abandon()
    assert not list(tmp_path.iterdir())


def test_short_writes_and_reads_go_on(whole, tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, memory, offset: pwrite(file, memory[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda file, into, offset: preadv(file, [into[0][:BLOCK]], offset))
    writing = Writing(tmp_path / "unit.safetensors", "block", "digest", NBYTES, checksum(whole))
    with Lanes(3, DEVICE) as lanes:
        lanes.store(writing, whole, NBYTES)
    writing.finish()
    found = read(tmp_path / "unit.safetensors", torch.empty(NBYTES, dtype=torch.uint8), 0)
    assert torch.equal(found, whole.cpu())


KILLED = """
import sys, time
from pathlib import Path
from fsdp_qlora.weights.base_cache.unit_file import Writing
writing = Writing(Path(sys.argv[1]) / "unit.safetensors", "block", "digest", 1 << 22, 0)
writing.write(0, memoryview(bytes(1 << 21)))
print("half", flush=True)
time.sleep(60)
"""


def test_what_a_killed_writer_leaves_is_swept_and_what_a_living_one_has_is_not(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        sweep(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1, "its writer lives"
        assert not writing_done(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_file_says_what_is_in_it():
    def key(codec=DOUBLE, shape=(64, 64), source="q.weight", ranks=1):
        return UnitKey(Layout({"q": (codec, shape), "n": (Plain(torch.float32), (64,))}, ranks), {"q": source}).digest

    assert key() == key(ranks=2) == key(ranks=12), "padding for ranks is not in the file"
    others = [key(NF4(False)), key(shape=(32, 128)), key(source="k.weight"), key(Plain(torch.bfloat16))]
    assert len({key(), *others}) == 5


def test_a_checkpoint_with_other_bytes_is_another_though_name_size_and_time_are_the_same(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    before, stat = Checkpoint(tmp_path).content(), file.stat()
    assert Checkpoint(tmp_path).content() == before
    save_file({"a": torch.ones(4)}, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert Checkpoint(tmp_path).content() != before


def test_a_checkpoint_of_the_hub_is_known_by_its_hash_wherever_it_lies(tmp_path):
    from safetensors.torch import save_file

    for place in ("one", "two"):
        blobs, snapshot = tmp_path / place / "blobs", tmp_path / place / "snapshots" / "c0ffee"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        save_file({"a": torch.zeros(4)}, blobs / ("ab" * 32))
        os.utime(blobs / ("ab" * 32), ns=(1, 1))
        (snapshot / "model.safetensors").symlink_to(blobs / ("ab" * 32))
    one, two = (Checkpoint(tmp_path / place / "snapshots" / "c0ffee") for place in ("one", "two"))
    assert one.content() == two.content()
    assert "ab" * 32 in one.content()
    os.utime(tmp_path / "two" / "blobs" / ("ab" * 32))  # downloaded again
    assert one.content() == two.content()


def test_a_checkpoint_whose_file_has_gone_is_a_users_error_in_one_line(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model_name: .*model\.safetensors cannot be read any more") as raised:
        checkpoint.content()
    assert "\n" not in str(raised.value)


def test_a_file_whose_folder_is_removed_while_it_is_written_is_not_kept_and_no_error(whole, tmp_path):
    folder = tmp_path / "entry"
    folder.mkdir()
    writing = Writing(folder / "unit.safetensors", "block", "digest", NBYTES, checksum(whole))
    with Lanes(3, DEVICE) as lanes:
        lanes.store(writing, whole, NBYTES)
    shutil.rmtree(folder)
    assert writing.finish() == 0
    writing.abandon()


def test_taking_back_leaves_another_runs_file(whole, tmp_path):
    path = tmp_path / "unit.safetensors"
    mine, theirs = (Writing(path, "block", "digest", NBYTES, checksum(whole)) for _ in range(2))
    with Lanes(3, DEVICE) as lanes:
        for writing in (mine, theirs):
            lanes.store(writing, whole, NBYTES)
            assert writing.finish()
    mine.take_back()
    assert read_contents(path, "digest")
    theirs.take_back()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["before its CRC", "between its CRC and its sum"])
def test_a_bit_that_flips_on_the_way_to_the_file_makes_no_file(when, whole, tmp_path, monkeypatch):
    writing = Writing(tmp_path / "unit.safetensors", "block", "digest", NBYTES, checksum(whole))
    crc32 = unit_file.zlib.crc32

    def flipping(memory: memoryview) -> int:
        before = crc32(memory)
        memory[5] ^= 4
        return crc32(memory) if when == "before its CRC" else before

    monkeypatch.setattr(unit_file.zlib, "crc32", flipping)
    with Lanes(3, DEVICE) as lanes:
        lanes.store(writing, whole.clone(), NBYTES)
    monkeypatch.setattr(unit_file.zlib, "crc32", crc32)
    with pytest.raises(Damaged, match="changed on their way to the disk"):
        writing.finish()
    writing.abandon()
    assert not list(tmp_path.iterdir())


def test_a_file_that_passes_every_crc_and_not_the_sum_is_damaged(path, whole):
    """As a bit that flips before the CRC is computed would make it, were its sum not compared when it is written."""
    contents = read_contents(path, "digest")
    data = bytearray(path.read_bytes())
    data[BLOCK + PIECE + 9] ^= 1
    crcs = list(contents.crcs)
    crcs[1] = unit_file.zlib.crc32(data[BLOCK + PIECE : BLOCK + 2 * PIECE])
    data[:BLOCK] = replace(contents, crcs=tuple(crcs)).header()
    path.write_bytes(data)
    with pytest.raises(Damaged, match=f"from {PIECE} on"):
        read(path, torch.empty(NBYTES, dtype=torch.uint8), 0)
    sums = list(contents.sums)
    sums[1] += 1
    data[:BLOCK] = replace(contents, crcs=tuple(crcs), sums=tuple(sums)).header()
    path.write_bytes(data)
    with pytest.raises(Damaged, match="do not make up the sum"):
        read_contents(path, "digest")


def test_what_the_system_says_of_another_users_file_in_memory_is_not_believed(path, monkeypatch):
    """Linux says that all of it is there. Where it is not, a read past the disk's own way would be the slow one."""
    path.read_bytes()
    file = os.open(path, os.O_RDONLY)
    assert unit_file._part_in_memory(file, path.stat().st_size) > 0.9
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert unit_file._part_in_memory(file, path.stat().st_size) == 0.0
    os.close(file)
