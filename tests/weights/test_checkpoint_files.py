"""Files of a checkpoint: pickles, pointers, adapters, code; the same tensors are read or one line says why not."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig

import train
from fsdp_qlora.errors import UserError
from fsdp_qlora.models import skeleton
from fsdp_qlora.models.fitting import fit, has_its_own_head
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.weights import hub as weights
from fsdp_qlora.weights.checkpoint import Checkpoint
from tests.support import tiny
from tests.support.built import built
from tests.support.checkpoint_forms import (
    HEAD,
    OPTIONS,
    TIED,
    assert_reads_what_transformers_reads,
    llama,
    pickled,
    refused,
    rewrite,
)
from tests.support.runs import flags
from tests.support.torchrun import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin_is_as_good(zipped, tied, tmp_path):
    pickled(llama(tmp_path, tie_word_embeddings=tied), _use_new_zipfile_serialization=zipped)
    assert_reads_what_transformers_reads(tmp_path)
    with built(OPTIONS | {"model_name": tmp_path}) as ours:
        assert ours.model.is_tied() == tied


def test_pytorch_model_bin_in_several_files(tmp_path):
    tensors = load_file(llama(tmp_path) / "model.safetensors")
    names, files = sorted(tensors), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for number, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[number::2]}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    assert_reads_what_transformers_reads(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "pytorch_model.bin"])
def test_weights_are_the_files_own_pages_and_no_copies(kind, tmp_path):
    """So that the system takes them back where memory is short: two blocks of 70B are 3.2 GiB for each rank."""
    expected = load_file(llama(tmp_path) / "model.safetensors")
    if kind == "pytorch_model.bin":
        pickled(tmp_path)
    found = Checkpoint(tmp_path).read(dict.fromkeys(expected), torch.device("cpu"))
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
        assert any(first <= tensor.data_ptr() < end for first, end in ranges), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_codes_without_a_word_on_their_scales_are_refused(is_pickled, dtype, tmp_path, capsys):
    """A config.json that lost its quantization_config; transformers reads such codes as if they were the weights."""
    file = llama(tmp_path / "model") / "model.safetensors"
    named = "model.layers.1.mlp.up_proj.weight"

    def quantize(tensors):
        tensors[f"{named}_scale_inv"] = torch.full((1, 1), 0.01)
        tensors[named] = (tensors[named] * 100).to(dtype)

    rewrite(tmp_path / "model", quantize)
    if is_pickled:
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    line = refused(tmp_path / "model", capsys)
    assert named in line
    assert "nothing there says how they were quantized" in line


def test_safetensors_go_before_pickles(tmp_path):
    llama(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_reads_what_transformers_reads(tmp_path)


class Surprise:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.file,)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "objects in a pickle": (
        lambda f: torch.save({"a": torch.ones(1), "b": Surprise(f.parent / "ran")}, f / "pytorch_model.bin"),
        "holds Python objects beside tensors",
    ),
    "no table": (lambda f: torch.save([torch.ones(1)], f / "pytorch_model.bin"), "is no table of tensors by name"),
    "a pickle cut short": (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\3\4 cut"), "cannot be read"),
    "nothing": (lambda f: None, "holds none of model.safetensors"),
    "another form": (lambda f: (f / "model.fp16.safetensors").write_bytes(b""), "only model.fp16.safetensors"),
    "a file outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        "names files outside its folder (../model.safetensors)",
    ),
    "a file at the root": (
        lambda f: (f / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "/etc/passwd"}}'),
        "names files outside its folder (/etc/passwd)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_files_that_are_not_read_say_why(kind, tmp_path, capsys):
    damage, why = DAMAGE[kind]
    folder = llama(tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path)  # where an index may point to
    (folder / "model.safetensors").unlink()
    damage(folder)
    assert why in refused(folder, capsys)
    assert not (tmp_path / "ran").exists()


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_recognised(file, tmp_path, capsys):
    (llama(tmp_path / "model") / file).write_text(POINTER)
    line = refused(tmp_path / "model", capsys, dataset=tiny.save_rows(tmp_path / "rows.jsonl", 4))
    assert f"{file} in {tmp_path / 'model'} is a git-lfs pointer" in line
    assert "git lfs pull" in line


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_recognised(beside_a_model, tmp_path, capsys):
    folder = tmp_path / "adapter"
    if beside_a_model:
        llama(folder)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    line = refused(folder, capsys)
    assert "holds an adapter (adapter_config.json)" in line
    assert ("beside a model" if beside_a_model else "set model_name to its base (somebody/base)") in line


def test_code_of_a_checkpoint_is_never_run_nor_asked_about(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "needs Python code of its own (auto_map in its config.json)" in refused(folder, capsys)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_family_that_transformers_knows_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = llama(tmp_path / "model")
    for file, classes in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Slow", "own.Fast"]}),
    ):
        settings = json.loads((folder / file).read_text()) | {"auto_map": classes}
        (folder / file).write_text(json.dumps(settings))
    rows = tiny.save_rows(tmp_path / "rows.jsonl", 4)
    options = {"model_name": folder, "dataset": rows, "max_steps": 1, "output_dir": tmp_path / "out"}
    assert train.main(flags(OPTIONS | options)) == 0


# --- the hub


def no_metadata(*_: object, **__: object) -> None:
    raise OSError("not a safetensors repository")


def test_names_of_pickles_on_the_hub_are_read_from_their_index(tmp_path, monkeypatch):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a.weight": "pytorch_model-1.bin"}}')
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", no_metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: index)
    monkeypatch.setattr(weights, "fetch", lambda *_: pytest.fail("downloaded"))
    assert weights.OnHub("somebody/something", None).names() == {"a.weight"}


def test_pickles_are_downloaded_only_where_there_is_nothing_better(tmp_path, monkeypatch):
    asked = []

    def download(name: str, allow_patterns: list[str], **_: object) -> Path:
        asked.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    weights.fetch("somebody/something", None)
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True]
    (tmp_path / "model.safetensors").touch()
    weights.fetch("somebody/something", None)
    assert len(asked) == 3


@pytest.mark.slow
@pytest.mark.parametrize("door", ["train", "fsdp_qlora.__main__"])
def test_one_ctrl_c_ends_a_download(door):
    """The hub's client has a thread for each file, and waits for them before it ends."""
    code = f"""
        import os, signal, sys, time
        from concurrent.futures import ThreadPoolExecutor
        import huggingface_hub
        import {door} as door
        from fsdp_qlora.weights.hub import fetch

        def begun(_):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            time.sleep(60)

        def download(*_, **__):
            with ThreadPoolExecutor() as files:
                list(files.map(begun, range(2)))

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        huggingface_hub.snapshot_download = download
        if "{door}" == "train":
            import fsdp_qlora.run
            fsdp_qlora.run.run = lambda *_: fetch("somebody/something", None)
            door._leave(door.main(["--model_name", "somebody/something"]))
        door.parse_as = lambda *_: fetch("somebody/something", None)
        sys.argv[1:] = ["merge"]
        sys.exit(door.entry())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=40)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_head_that_cannot_be_compared_without_a_download_is_read(tmp_path, monkeypatch):
    """Twice the same numbers train the same, so nothing need be downloaded to make a plan."""
    config = LlamaConfig(**tiny.SHAPE | TIED)
    model = skeleton.build(config, Precision(torch.float32, torch.float32), "sdpa")
    names = dict.fromkeys(model.state_dict(), "model.safetensors")
    hub = SimpleNamespace(weight_map=names)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision: hub)
    monkeypatch.setattr(weights, "fetch", lambda *_: pytest.fail("downloaded"))
    assert HEAD in names
    assert has_its_own_head(model, fit(model, weights.OnHub("somebody/something", None)))
    del names[HEAD]
    assert not has_its_own_head(model, fit(model, weights.OnHub("somebody/something", None)))


def test_an_adapter_on_the_hub_is_recognised(monkeypatch):
    def absent(*_: object, **__: object) -> None:
        raise OSError("somebody/adapter does not appear to have a file named config.json")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", absent)
    monkeypatch.setattr(skeleton, "find_adapter_config_file", lambda name, revision: "adapter_config.json")
    with pytest.raises(UserError, match="somebody/adapter is an adapter, not a model"):
        skeleton.read_config("somebody/adapter", None)
