"""A base that is quantized once: the second start has the bytes of the first, and whatever is wrong is encoded anew."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from fsdp_qlora.__main__ import main
from fsdp_qlora.config.parse import parse
from fsdp_qlora.errors import UserError
from fsdp_qlora.weights.base_cache import entry, unit_file
from fsdp_qlora.weights.base_cache.kept import VERSION
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.codecs import HQQ, NF4, Plain
from fsdp_qlora.weights.layout import Layout
from tests.support import plain, tiny
from tests.support.built import built
from tests.support.runs import Options, run_alone
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
    return sorted(path.glob(f"*{entry.SUFFIX}"))


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
    assert line.startswith(f"base_cache: {folder} has changed: ")
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
    monkeypatch.setattr(entry, "MOST_FULL", 1e-9)
    assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert "more would fill the disk of" in line
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_that_becomes_full_keeps_what_is_whole(options, monkeypatch, capsys, encoded, tmp_path, reads):
    pwrite, left = os.pwrite, [100_000]

    def full(file: int, memory: memoryview, offset: int) -> int:
        left[0] -= len(memory)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, memory, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert_same(start(options), encoded)
    (line,) = said(capsys)
    assert "No space left on device" in line
    (path,) = (tmp_path / "cache").iterdir()
    assert 0 < len(files(path)) < UNITS
    assert {file.name for file in path.iterdir()} == {entry.NOTE, *(file.name for file in files(path))}
    reads.clear()
    assert_same(start(options), encoded)
    assert 0 < len(reads) < 30
    assert len(files(path)) == UNITS


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
    assert "cannot be written" in line


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
    assert not (tmp_path / "home").exists(), "this one is small"
    monkeypatch.setattr("fsdp_qlora.placement.cache_use.SMALL", 0)
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
    assert {file.name for file in path.iterdir()} == {entry.NOTE, *(file.name for file in files(path))}
    assert_same(start(options), encoded)
    assert not reads


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_leaves_nothing_that_counts(options, encoded, tmp_path, reads, capsys):
    process = start_apart(options, 0.3)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache").glob(f"*/{unit_file.PART}*")) or not list((tmp_path / "cache").glob("*/*.s*")):
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
    assert {file.name for file in path.iterdir()} == {entry.NOTE, *(file.name for file in files(path))}
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
            found = {}
            for unit in ours.model.units:
                with unit.frozen.opened():
                    flat = unit.frozen.flat.detach()
                    flat = flat.full_tensor() if hasattr(flat, "full_tensor") else flat
                    found[unit.name] = flat.view(torch.uint8).clone()
            return found

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
    os.utime(kept / entry.NOTE, (0, 0))
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
        layout.write(buffer, "w", codec.encode(weight))
        layout.write(buffer, "n", {"values": weight[0]})
        words = buffer.view(torch.int64) * torch.arange(1, len(buffer) // 8 + 1)  # each at its place
        found[codec.name] = int(words.sum())
    assert (VERSION, found) == (1, BYTES)
