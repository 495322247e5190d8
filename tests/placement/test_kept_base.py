"""A base that is quantized once: the second start has the bytes of the first, and whatever is wrong is encoded anew."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

import train
from fsdp_qlora.__main__ import main
from fsdp_qlora.config.parse import parse
from fsdp_qlora.errors import UserError
from fsdp_qlora.placement import from_cache
from fsdp_qlora.training.checkpoint_folder import read_checkpoint, write_manifest
from fsdp_qlora.weights.base_cache import disk, encoders, names
from fsdp_qlora.weights.base_cache.encoders import VERSION
from fsdp_qlora.weights.base_cache.part import make_part
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.codecs import HQQ, NF4, Plain
from fsdp_qlora.weights.layout import Layout
from tests.support import plain, tiny
from tests.support.built import built
from tests.support.runs import Options, flags, run_alone
from tests.support.torchrun import ROOT, run_torchrun

BYTES = {
    "nf4-double-quantized": 4693471305193682929,
    "nf4": -8195448152219349221,
    "hqq-4bit-g32-axis1-float32-unoptimized": 8651956033975050959,
    "bfloat16": 8461950338540401776,
}  # a sum of a small weight's stored words, by codec
UNITS = 6  # the embedding, three blocks, the head and the rest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(model, tmp_path) -> Options:
    return {
        "dataset": "dummy", "precision": "fp32", "lora_rank": 2, "model_name": model, "base_cache": tmp_path / "cache",
    }  # fmt: skip


@pytest.fixture(scope="module")
def encoded(model) -> dict[str, Tensor]:
    """The bytes without a cache."""
    return start({"dataset": "dummy", "precision": "fp32", "lora_rank": 2, "model_name": model, "base_cache": "null"})


@pytest.fixture
def kept(options, encoded) -> Path:
    """The entry, after a first start."""
    assert_same(start(options), encoded)
    (path,) = Path(str(options["base_cache"])).iterdir()
    assert len(files(path)) == UNITS
    return path


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the tensors that are read from the checkpoint from now on."""
    names: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, wanted, device: names.extend(wanted) or read(self, wanted, device)
    )
    return names


def start(options: Options) -> dict[str, Tensor]:
    """The bytes that a rank holds once the model is loaded."""
    with built(options) as ours:
        held = {}
        for unit in ours.model.units:
            with unit.frozen.opened():
                flat = unit.frozen.flat.detach()
                assert not isinstance(flat, DTensor)
                unit.frozen.location()  # compares the checksum
                held[unit.name] = flat.view(torch.uint8).cpu().clone()
        return held


def assert_same(held: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert held.keys() == expected.keys()
    for name, whole in held.items():
        assert torch.equal(whole, expected[name]), name


def files(path: Path) -> list[Path]:
    return sorted(path.glob(f"*{names.SUFFIX}"))


def ours(path: Path) -> set[str]:
    """Names of the files of a whole entry."""
    return {names.NOTE, names.used_mark(), *(file.name for file in files(path))}


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines about the cache, other than what is said of loading."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("base_cache")]


PLACED: dict[str, Options] = {
    "replicated": {},
    "streamed": {"use_cpu_offload": True, "resident_blocks": 0},
    "streamed-one-resident": {"use_cpu_offload": True, "resident_blocks": 1},
}


@pytest.mark.parametrize("case", PLACED)
def test_a_second_start_has_the_bytes_of_the_first_and_reads_no_weights(case, options, kept, encoded, reads, capsys):
    capsys.readouterr()
    assert_same(start(options | PLACED[case]), encoded)
    assert not reads
    out = capsys.readouterr().out
    assert f"{UNITS} of {UNITS} units from {kept}" in out
    assert "base_cache" not in out


def test_a_run_from_the_cache_trains_as_the_first_did(options, tmp_path, reads):
    more = {"dataset_samples": 8, "context_length": 32, "batch_size": 2, "lr": 1e-2}
    first = run_alone(options | more, tmp_path / "first")
    assert reads
    reads.clear()
    second = run_alone(options | more, tmp_path / "second")
    assert not reads
    assert len(first.losses) == 4
    assert second.losses == first.losses


def flip(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-3000, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 16]))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def damage_header(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(60)
        opened.write(b"?")


@pytest.mark.parametrize("damage", [flip, cut, damage_header, Path.unlink], ids=["flipped", "cut", "header", "gone"])
def test_a_damaged_file_is_encoded_anew_and_no_other(
    damage: Callable[[Path], object], options, kept, encoded, capsys, reads
):
    file = kept / files(kept)[0].name
    whole = file.read_bytes()
    damage(file)
    capsys.readouterr()
    assert_same(start(options), encoded)
    lines = said(capsys)
    if damage is Path.unlink:
        assert not lines, "what was never written is no damage"
    else:
        (line,) = lines
        assert "cannot be taken: encoded anew" in line
    assert 0 < len(reads) < 10, "the tensors of one unit"
    assert file.read_bytes() == whole
    reads.clear()
    assert_same(start(options), encoded)
    assert not reads
    assert not said(capsys)


def test_a_changed_checkpoint_is_not_served(options, kept, tmp_path, capsys):
    """The same name, size and time of the last change, other bytes."""
    folder = tmp_path / "model"
    shutil.copytree(options["model_name"], folder)
    options |= {"model_name": folder, "base_cache": tmp_path / "other"}
    first = start(options)
    weights = folder / "model.safetensors"
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-40_000, os.SEEK_END)
        file.write(bytes(1000))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    capsys.readouterr()
    second = start(options)
    (line,) = said(capsys)
    assert line.startswith(f"base_cache: removed, as {folder} has changed since: ")
    assert_same(second, start(options | {"base_cache": "null"}))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "other").iterdir())) == 1, "of the earlier bytes nothing is left"


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(options, tmp_path, monkeypatch, capsys, encoded):
    folder = tmp_path / "model"
    shutil.copytree(options["model_name"], folder)
    read = Checkpoint.read

    def changing(self: Checkpoint, wanted: dict, device: torch.device) -> dict:
        os.utime(folder / "model.safetensors")
        return read(self, wanted, device)

    monkeypatch.setattr(Checkpoint, "read", changing)
    assert_same(start(options | {"model_name": folder}), encoded)
    (line,) = said(capsys)
    assert "the checkpoint's files were changed while they were read" in line
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("more", [{}, {"hqq_group_size": 32}], ids=str)
def test_a_base_in_hqq_is_kept_too(more, options, tmp_path, reads):
    shape = tiny.SHAPE | {"intermediate_size": 192}  # of whole groups
    hqq = (
        options | {"train_type": "hqq_lora", "model_name": tiny.save_model(LlamaConfig(**shape), tmp_path / "m")} | more
    )
    first = start(hqq)
    assert reads
    reads.clear()
    assert_same(start(hqq), first)
    assert not reads


def test_other_options_of_the_codec_are_another_base(options, kept, encoded):
    assert_same(
        start(options | {"double_quant": False}), start(options | {"double_quant": False, "base_cache": "null"})
    )
    assert len(list(kept.parent.iterdir())) == 2
    assert_same(start(options), encoded)


def test_a_disk_without_room_is_said_once_and_left_as_it_is(options, monkeypatch, capsys, encoded, tmp_path):
    monkeypatch.setattr(disk, "MOST_FULL", 1e-9)
    monkeypatch.setattr(disk, "LITTLE", 0.0)
    assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert "more would fill the disk of" in line
    assert not list((tmp_path / "cache").iterdir())


@contextmanager
def full_after(nbytes: int, number: int = errno.ENOSPC) -> Iterator[None]:
    """Let the disk refuse after so many bytes, as a quota does: its free space has not shown it."""
    pwrite, left = os.pwrite, [nbytes]

    def full(file: int, memory: memoryview, offset: int) -> int:
        left[0] -= len(memory)
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return pwrite(file, memory, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        yield


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_refuses_has_all_of_it_back_and_is_not_filled_again(
    number, options, capsys, encoded, tmp_path, reads
):
    with full_after(100_000, number):
        assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert f"refused it ({os.strerror(number)}); 0.0 GiB that this run had written are removed" in line
    (path,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in path.iterdir()} == {names.NOTE, names.used_mark(), names.full_mark()}
    assert_same(start(options), encoded)  # it would have room now, which nothing shows
    (line,) = said(capsys)
    assert "refused it on" in line
    assert not files(path)
    assert main(["cache", "clear", "--base_cache", str(path.parent)]) == 0
    capsys.readouterr()
    assert_same(start(options), encoded)
    assert not said(capsys)
    assert len(files(path)) == UNITS
    assert {file.name for file in path.iterdir()} == ours(path)
    reads.clear()
    assert_same(start(options), encoded)
    assert not reads


def test_a_disk_that_refuses_keeps_what_earlier_runs_wrote(options, kept, encoded, capsys):
    files(kept)[2].unlink()
    others = {file: file.stat().st_mtime_ns for file in files(kept)}
    with full_after(1000):
        assert_same(start(options), encoded)
    assert "refused it" in said(capsys)[0]
    assert {file: file.stat().st_mtime_ns for file in files(kept)} == others


def test_what_the_run_still_writes_has_its_room_on_the_same_disk(options, encoded, tmp_path, capsys, monkeypatch):
    """run.py promises checkpoints their space before the base is loaded: the cache must not take it."""
    usage = shutil.disk_usage(tmp_path)
    seen: list[disk.Owed] = []
    lack = disk.lack_of_room

    def measured(folder: Path, nbytes: int, owed: disk.Owed) -> str:
        seen.append(owed)
        free = usage._replace(total=1_000_000, used=0, free=1_000_000 - 900_000 + nbytes + 5000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda folder: free)
            return lack(folder, nbytes, owed)

    monkeypatch.setattr("fsdp_qlora.weights.base_cache.kept.lack_of_room", measured)
    more = {"dataset_samples": 8, "context_length": 32, "batch_size": 2, "max_steps": 1, "save_steps": 1}
    run_alone(options | more, tmp_path / "out")
    (line,) = said(capsys)
    assert "adapter and checkpoints may take would fill the disk" in line
    assert seen[0].folder == tmp_path / "out"
    assert seen[0].nbytes > 5000
    assert not list((tmp_path / "cache").iterdir())


def test_a_bit_that_flips_before_it_is_written_costs_a_file_and_no_later_start(
    options, encoded, capsys, monkeypatch, tmp_path, reads
):
    from fsdp_qlora.weights.base_cache.unit_file import Writing

    write, flipped = Writing.write, []

    def flipping(self: Writing, index: int, memory: memoryview) -> None:
        copied = memory
        if not flipped:
            flipped.append(self)
            copied = memoryview(bytearray(memory))
            copied[100] ^= 1
        write(self, index, copied)

    with monkeypatch.context() as patch:
        patch.setattr(Writing, "write", flipping)
        assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert "its bytes were changed on their way to the disk" in line
    (path,) = (tmp_path / "cache").iterdir()
    assert len(files(path)) == UNITS - 1
    reads.clear()
    assert_same(start(options), encoded)
    assert 0 < len(reads) < 10, "the tensors of one unit"
    assert not said(capsys)


def test_a_resumed_run_over_other_weights_names_the_cache_that_they_came_from(options, tmp_path, capsys):
    more = {"dataset_samples": 8, "context_length": 32, "batch_size": 2, "max_steps": 2, "save_steps": 1}
    first = run_alone(options | more, tmp_path / "out")
    saved = read_checkpoint(first.folder / "checkpoint-1")
    write_manifest(saved.path, replace(saved.manifest, base=saved.manifest.base | {"checksum": 1}))
    shutil.rmtree(first.folder / "checkpoint-2")
    asked = flags(options | more | {"resume": "auto", "output_dir": first.folder})
    capsys.readouterr()
    assert train.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"they came from the base cache, {next((tmp_path / 'cache').iterdir())}: --base_cache null" in line


def test_bytes_that_change_after_they_were_read_name_the_cache(options, kept):
    with built(options) as ours:
        unit = ours.model.units[1]
        unit.frozen.flat.detach().view(torch.uint8)[7] ^= 1
        with unit.frozen.opened(), pytest.raises(RuntimeError, match="frozen bytes were changed") as raised:
            unit.frozen.location()
    assert f"They came from the base cache, {kept}: try --base_cache null" in str(raised.value)


def test_no_more_than_two_units_are_on_their_way(options, kept, monkeypatch):
    """The plan counts as many in GPU memory."""
    begun, most, begin = list[weakref.ref[from_cache._Coming]](), list[int](), from_cache._start

    def counted(*args: object) -> from_cache._Coming:
        coming = begin(*args)  # type: ignore[arg-type]
        begun.append(weakref.ref(coming))
        most.append(sum(one() is not None for one in begun))
        return coming

    monkeypatch.setattr(from_cache, "_start", counted)
    start(options)
    assert len(most) == UNITS
    assert max(most) == 2


def other_encoder(monkeypatch: pytest.MonkeyPatch, **change: str) -> None:
    made = encoders.encoders_of
    monkeypatch.setattr("fsdp_qlora.placement.cache_use.encoders_of", lambda *args: made(*args) | change)


def test_another_card_has_an_entry_of_its_own(options, kept, encoded, monkeypatch, reads, capsys):
    other_encoder(monkeypatch, device="NVIDIA H100")
    assert_same(start(options), encoded)
    assert reads
    assert len(list(kept.parent.iterdir())) == 2
    assert not said(capsys)


def test_a_newer_package_replaces_the_entry_and_an_older_one_leaves_it(options, kept, encoded, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        other_encoder(patch, bitsandbytes="999.1")
        capsys.readouterr()
        assert_same(start(options), encoded)
        (line,) = said(capsys)
        assert line.startswith("base_cache: removed, as newer packages quantize it anew: ")
        (newer,) = kept.parent.iterdir()
        assert newer != kept
    assert_same(start(options), encoded)
    assert not said(capsys)
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, newer.name}


def test_what_encodes_is_what_the_codecs_need():
    cpu = torch.device("cpu")
    assert encoders.encoders_of([NF4(True), Plain(torch.float32)], cpu).keys() == {
        "device", "fsdp_qlora", "torch", "bitsandbytes",
    }  # fmt: skip
    hqq = encoders.encoders_of([HQQ(4, 64, 1, torch.float32)], cpu)
    assert hqq.keys() == {"device", "fsdp_qlora", "torch", "hqq"}
    assert hqq["device"] == "cpu"
    one, other = ({"device": card, "torch": "2.13.0"} for card in ("A", "B"))
    assert encoders.merged([one, other, one]) == {"device": "A + B", "torch": "2.13.0"}


def test_other_units_of_the_same_base_are_another_entry(options, kept, encoded):
    """Else orphans of both would stay as long as either is used, and 18 of 6 units be listed."""
    start(options | {"precision": "bf16"})
    assert len(list(kept.parent.iterdir())) == 2
    assert all(len(files(path)) == UNITS for path in kept.parent.iterdir())


def test_entries_that_no_run_has_used_are_removed_on_a_start_that_only_reads(options, kept, encoded, reads, capsys):
    shutil.copytree(kept, kept.with_name("0" * 32))
    for file in kept.with_name("0" * 32).iterdir():
        os.utime(file, (1e9, 1e9))
    capsys.readouterr()
    assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert "no run has used it for 30 days" in line
    assert not reads
    assert list(kept.parent.iterdir()) == [kept]


def test_a_run_that_writes_nothing_leaves_another_runs_entry_as_it_is(options, kept, monkeypatch, capsys):
    """It has begun there, and has no file yet."""
    for file in files(kept):
        file.unlink()
    part, opened = make_part(kept)
    monkeypatch.setattr(disk, "MOST_FULL", 1e-9)
    monkeypatch.setattr(disk, "LITTLE", 0.0)
    start(options)
    assert "would fill the disk" in said(capsys)[-1]
    assert part.exists()
    assert (kept / names.NOTE).exists()
    os.close(opened)


def test_an_entry_that_is_cleared_while_it_is_written_is_gone_on_with(options, encoded, monkeypatch, capsys, tmp_path):
    from fsdp_qlora.weights.base_cache.kept import KeptBase

    refused, count = KeptBase.refused, [0]

    def clearing(self: KeptBase) -> object:  # asked before each unit
        count[0] += 1
        if count[0] == 3:
            deadline = time.monotonic() + 60
            while len(files(self.folder)) < 2:  # what was begun is whole
                assert time.monotonic() < deadline
            shutil.rmtree(tmp_path / "cache")
        return refused(self)

    monkeypatch.setattr(KeptBase, "refused", clearing)
    assert_same(start(options), encoded)
    assert not said(capsys)
    (path,) = (tmp_path / "cache").iterdir()
    assert len(files(path)) == UNITS - 2
    assert {file.name for file in path.iterdir()} == ours(path)


def test_a_checkpoint_that_goes_away_is_one_line(options, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(options["model_name"], folder)
    content = Checkpoint.content

    def gone(self: Checkpoint) -> str:
        (folder / "model.safetensors").unlink()
        return content(self)

    monkeypatch.setattr(Checkpoint, "content", gone)
    with pytest.raises(UserError, match=r"model_name: .* cannot be read any more"):
        start(options | {"model_name": folder})


def test_a_disk_without_direct_reads_is_said_with_its_price(options, kept, encoded, monkeypatch, capsys):
    opened = os.open

    def refusing(path: str | Path, flags: int, *args: int, **named: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *args, **named)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr("fsdp_qlora.weights.base_cache.unit_file.IN_MEMORY", 2.0)
    capsys.readouterr()
    assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert "has no direct reads (O_DIRECT): each byte is copied once more by a core" in line


def test_auto_keeps_nothing_on_a_network_mount_and_says_so(options, monkeypatch, tmp_path, capsys, encoded):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fsdp_qlora.placement.cache_use.SMALL", 0)
    monkeypatch.setattr(disk, "kind_of_disk", lambda folder: "nfs4")
    assert_same(start(options | {"base_cache": "auto"}), encoded)
    (line,) = said(capsys)
    assert f"{tmp_path / 'home' / 'fsdp_qlora' / 'base'} is on a network mount, or may be (nfs4)" in line
    assert not (tmp_path / "home" / "fsdp_qlora" / "base").exists()  # on a GPU its rates are kept beside it
    start(options | {"base_cache": tmp_path / "named"})
    assert not said(capsys)
    assert len(list((tmp_path / "named").iterdir())) == 1


@pytest.mark.parametrize("kind", ["a file in its place", "a folder that cannot be written"])
def test_a_home_that_cannot_be_written_is_said_once(kind, options, monkeypatch, capsys, encoded, tmp_path):
    if kind == "a file in its place":
        (tmp_path / "cache").write_text("")
    else:

        def refuse(self: Path, *args: object, **named: object) -> None:
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(Path, "mkdir", refuse)
    assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert ("cannot be written" if kind == "a file in its place" else "this user cannot write to") in line


def test_a_read_only_cache_is_read(options, kept, encoded, monkeypatch, reads, capsys):
    def refuse(self: Path, *args: object, **named: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    capsys.readouterr()
    assert_same(start(options), encoded)
    assert not reads
    assert not said(capsys)


def test_a_user_without_a_home_is_told(options, monkeypatch, capsys, encoded):
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("fsdp_qlora.placement.cache_use.SMALL", 0)
    assert_same(start(options | {"base_cache": "auto"}), encoded)
    (line,) = said(capsys)
    assert "has no home" in line


def test_auto_keeps_large_bases_in_the_users_cache_folder(options, monkeypatch, tmp_path, capsys, encoded, reads):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    start(options | {"base_cache": "auto"})
    assert not (tmp_path / "home" / "fsdp_qlora" / "base").exists(), "this one is small"
    monkeypatch.setattr("fsdp_qlora.placement.cache_use.SMALL", 0)
    monkeypatch.setattr(disk, "kind_of_disk", lambda folder: "ext4")
    start(options | {"base_cache": "auto"})
    (path,) = (tmp_path / "home" / "fsdp_qlora" / "base").iterdir()
    assert len(files(path)) == UNITS
    reads.clear()
    assert_same(start(options | {"base_cache": "true"}), encoded)
    assert not reads


def test_what_a_checkpoint_has_already_is_not_kept(options, tmp_path, capsys):
    folder = tmp_path / "4bit"
    plain.load_quantized(options["model_name"], plain.Recipe()).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    capsys.readouterr()
    start(options | {"model_name": folder})
    assert "base_cache: this base is read as the checkpoint has it" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("option", "value"), [("dummy_weights", "true"), ("train_type", "lora")])
def test_a_cache_that_nothing_would_be_kept_in_is_refused(option, value):
    with pytest.raises(UserError, match=f"--base_cache auto: has no effect with --{option} {value}"):
        parse(["--model_name", "m", "--base_cache", "auto", f"--{option}", value])
    with pytest.raises(UserError, match="no cache is --base_cache null"):
        parse(["--model_name", "m", "--base_cache", "false"])


STARTS = """
    import os, sys, time
    from tests.support.built import built
    slow = float(sys.argv[3])
    if slow:
        pwrite = os.pwrite
        os.pwrite = lambda *args: time.sleep(slow) or pwrite(*args)
    print("ready", flush=True)
    sys.stdin.readline()
    common = {"dataset": "dummy", "precision": "fp32", "lora_rank": 2}
    with built(common | {"model_name": sys.argv[1], "base_cache": sys.argv[2]}):
        pass
    """


def start_apart(options: Options, slow: float) -> subprocess.Popen[str]:
    code = "\n".join(line.strip() if not line.startswith("     ") else line[4:] for line in STARTS.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(options["model_name"]), str(options["base_cache"]), str(slow)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_two_runs_that_write_at_once_do_not_harm_each_other(options, encoded, tmp_path, reads):
    both = [start_apart(options, 0.02) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "base_cache" not in out
    (path,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in path.iterdir()} == ours(path)
    assert_same(start(options), encoded)
    assert not reads


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_leaves_nothing_that_counts(options, encoded, tmp_path, reads, capsys):
    process = start_apart(options, 0.3)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache").glob(f"*/{names.PART}*")) or not list((tmp_path / "cache").glob("*/*.s*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (path,) = (tmp_path / "cache").iterdir()
    before = len(files(path))
    assert 0 < before < UNITS
    assert_same(start(options), encoded)
    assert 0 < len(reads) < 30
    assert not said(capsys)
    assert {file.name for file in path.iterdir()} == ours(path)
    assert len(files(path)) == UNITS


RANKS = """
    import os, shutil, sys
    from pathlib import Path
    import torch
    from fsdp_qlora.placement import load
    from tests.support.built import built
    from tests.support.meeting import RANK, meet_at

    model, place, homes = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if homes != "one node":  # two nodes of two ranks
        os.environ |= {"LOCAL_RANK": str(RANK % 2), "LOCAL_WORLD_SIZE": "2"}
    common = {"dataset": "dummy", "precision": "fp32", "lora_rank": 2, "model_name": model, "batch_size": 1}
    cases = {
        "replicated": {"sharding_strategy": "ddp"},
        "sharded": {"sharding_strategy": "full_shard"},
        "offloaded": {"use_cpu_offload": True, "cpu_offload_by": "fsdp2"},
        "streamed": {"use_cpu_offload": True, "resident_blocks": 0},
        "streamed-one-resident": {"use_cpu_offload": True, "resident_blocks": 1},
        "hybrid": {"sharding_strategy": "hybrid_full_shard", "hybrid_shard_size": 2},
    }

    def held(name, options):
        meet_at(name)
        with built(common | options) as ours:
            return ours.frozen_bytes()

    encoding, encode = [0], load.encode
    def counted(*args):
        encoding[0] += 1
        return encode(*args)
    load.encode = counted
    for name in sys.argv[4:]:
        options = cases[name]
        folder = place / (f"node{RANK // 2}" if homes == "own homes" else "home") / name
        expected = held(f"{name} without", options | {"base_cache": "null"})
        first = held(f"{name} first", options | {"base_cache": folder})
        encoding[0] = 0
        files = {file: file.stat().st_mtime_ns for file in folder.glob("*/*.safetensors")}
        second = held(f"{name} second", options | {"base_cache": folder})
        same = all(torch.equal(first[n], expected[n]) and torch.equal(second[n], expected[n]) for n in expected)
        others = RANK != 0 and (homes != "own homes" or RANK == 1)  # rank 0 damages a file of theirs below
        untouched = others or files == {file: file.stat().st_mtime_ns for file in folder.glob("*/*.safetensors")}
        meet = [file.name for file in folder.glob("*/.*")]
        again = encoding[0]
        if RANK == 0:  # one file is damaged: every rank encodes it anew
            file = sorted(files)[1]
            data = bytearray(file.read_bytes())
            data[5000] ^= 1
            file.write_bytes(data)
        third = held(f"{name} third", options | {"base_cache": folder})
        mended = all(torch.equal(third[n], expected[n]) for n in expected)
        found = len(expected), len(files), same, untouched, meet, again, mended
        sys.stdout.write(f"rank {RANK}: {name} {found}\\n")
        sys.stdout.flush()
    """


@pytest.mark.parametrize(
    ("ranks", "homes", "names"),
    [
        (2, "one node", ["replicated", "sharded", "offloaded", "streamed", "streamed-one-resident"]),
        (4, "one node", ["sharded", "hybrid"]),
        (4, "own homes", ["replicated", "streamed"]),
        (4, "one home", ["offloaded", "streamed-one-resident"]),
    ],
    ids=["two-ranks", "four-ranks", "two-nodes-with-homes-of-their-own", "two-nodes-with-one-home"],
)
def test_every_placement_reads_its_part_on_every_rank(ranks, homes, names, model, tmp_path):
    done = run_torchrun(RANKS, ranks, [str(model), str(tmp_path), homes, *names], timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for name in names:
        for rank in range(ranks):
            line = f"rank {rank}: {name} {(UNITS, UNITS, True, True, [], 0, True)}\n"
            assert line in done.stdout, f"{line}{done.stdout}\n{done.stderr}"
    assert done.stdout.count("cannot be taken: encoded anew") == len(names)


REFUSED = """
    import sys
    import torch
    from fsdp_qlora.placement.streamed import Streamed
    from tests.support.built import built
    from tests.support.meeting import RANK, meet_at

    model, cache = sys.argv[1:]
    common = {"dataset": "dummy", "precision": "fp32", "lora_rank": 2, "model_name": model, "batch_size": 1,
              "use_cpu_offload": True, "resident_blocks": 0}

    def held(name, more):
        meet_at(name)
        with built(common | more) as ours:
            return ours.frozen_bytes()

    expected = held("without", {"base_cache": "null"})
    held("first", {"base_cache": cache})
    Streamed._is_readable = lambda self: RANK == 0  # the system has let this rank alone page-lock the memory
    second = held("second", {"base_cache": cache})
    same = all(torch.equal(second[name], expected[name]) for name in expected)
    sys.stdout.write(f"rank {RANK}: {same}\\n")
    """


def test_ranks_that_hold_a_unit_in_different_ways_read_it_together(model, tmp_path):
    done = run_torchrun(REFUSED, 2, [str(model), str(tmp_path)], timeout=100)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert {"rank 0: True", "rank 1: True"} <= set(done.stdout.splitlines()), f"{done.stdout}\n{done.stderr}"
    assert "6 of 6 units" in done.stdout


FULL = """
    import errno, os, sys
    from pathlib import Path
    from tests.support.built import built
    from tests.support.meeting import RANK, meet_at
    from fsdp_qlora.weights.base_cache.unit_file import Writing

    model, cache = sys.argv[1], Path(sys.argv[2])
    finish = Writing.finish
    def refused(self):  # once the other rank has written
        if RANK == 1 and len(list(cache.glob("*/*.safetensors"))) >= 1:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return finish(self)
    Writing.finish = refused
    common = {"dataset": "dummy", "precision": "fp32", "lora_rank": 2, "model_name": model, "base_cache": cache}
    meet_at("first")
    with built(common):
        pass
    """


def test_every_rank_takes_back_what_it_wrote_where_the_disk_refuses_one(model, tmp_path):
    done = run_torchrun(FULL, 2, [str(model), str(tmp_path / "cache")], timeout=200)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (path,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in path.iterdir()} == {names.NOTE, names.used_mark(), names.full_mark()}
    lines = [line for line in done.stdout.splitlines() if line.startswith("base_cache")]
    assert len(lines) == 1, done.stdout
    assert "refused it (Disk quota exceeded); 0.0 GiB that this run had written are removed" in lines[0]


def test_the_commands_list_and_clear(options, kept, capsys):
    place = ["--base_cache", str(kept.parent)]
    capsys.readouterr()
    assert main(["cache", "list", *place]) == 0
    line, total = capsys.readouterr().out.splitlines()
    assert f"nf4-double-quantized  {options['model_name']}; made {time.strftime('%Y-')}" in line
    assert f"in 1 base in {kept.parent}" in total
    assert main(["cache", "clear", *place, "--model", "another"]) == 2
    assert f"of these it does: {options['model_name']}" in capsys.readouterr().err
    assert main(["cache", "clear", *place, "--older_than_days", "1"]) == 0
    assert "0 bases removed" in capsys.readouterr().out
    assert kept.exists()
    for file in (kept / names.NOTE, kept / names.used_mark()):
        os.utime(file, (0, 0))
    files(kept)[0].unlink()
    assert main(["cache", "list", *place]) == 0
    assert f"{UNITS - 1} of {UNITS} units" in capsys.readouterr().out
    assert main(["cache", "clear", *place, "--older_than_days", "1", "--model", str(options["model_name"])]) == 0
    assert "1 base removed" in capsys.readouterr().out
    assert not list(kept.parent.iterdir())
    assert main(["cache", "list", "--base_cache", str(kept)]) == 2
    assert main(["cache"]) == 2
    assert "cache list, cache clear" in capsys.readouterr().err


def test_bytes_of_the_encoders_have_a_version():
    """Fails where an encoder or the layout makes other bytes of the same weights: VERSION then has to count up."""
    weight = (torch.arange(64 * 96).remainder(211).float() - 105).reshape(64, 96) / 128  # sums of these are exact
    found = {}
    for codec in (NF4(True), NF4(False), HQQ(4, 32, 1, torch.float32, optimize=False), Plain(torch.bfloat16)):
        layout = Layout({"w": (codec, (64, 96)), "n": (Plain(torch.float32), (96,))})
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
        codec.encode(weight, layout.views(buffer)["w"])
        Plain(torch.float32).encode(weight[0], layout.views(buffer)["n"])
        words = buffer.view(torch.int64) * torch.arange(1, len(buffer) // 8 + 1)  # each at its place
        found[codec.name] = int(words.sum())
    assert (VERSION, found) == (1, BYTES)
