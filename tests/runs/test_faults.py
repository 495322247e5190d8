"""What a user meets when something is wrong: one clear line, the right exit code, and no finished work lost."""

import errno
import http.server
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fsdp_qlora.config.options import LaunchOptions
from fsdp_qlora.distributed.world import open_world
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.models.precision import MODES, precision_of
from fsdp_qlora.runtime.files import LOCK
from fsdp_qlora.runtime.libraries import go_offline_if_unreachable
from tests.support.tiny import SHAPE, save_model
from tests.support.torchrun import ROOT, finish, ranks_of, run_torchrun, stacks, start_torchrun

ADAPTER = "adapter_model.safetensors"
ROWS, SEED = 16, 7
STEPS_BEFORE_POISON = 2


@dataclass(frozen=True)
class Ended:
    """How a case ended: exit code and output of each rank, and its output_dir."""

    codes: list[int]
    out: list[str]
    err: list[str]
    folder: Path

    @property
    def lines(self) -> list[str]:
        """What the user sees on standard error, of all ranks together."""
        return [line for text in self.err for line in text.splitlines() if line.strip()]

    @property
    def everything(self) -> str:
        return "\n".join([*self.out, *self.err])


@dataclass(frozen=True)
class Material:
    """A model and data that work, and damaged copies of them."""

    root: Path

    def path(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    made = Material(tmp_path_factory.mktemp("material"))
    save_model(LlamaConfig(**SHAPE), made.root / "model")
    save_model(LlamaConfig(**SHAPE), made.root / "shard_gone", max_shard_size="200KB")
    next((made.root / "shard_gone").glob("model-00002-*")).unlink()
    _write_rows(made.root / "rows.jsonl", [f"row {i}" for i in range(ROWS)])
    _damage_models(made.root)
    _damage_data(made.root)
    return made


def _write_rows(file: Path, prompts: list[str]) -> None:
    file.write_text("".join(json.dumps({"prompt": p, "completion": " an answer"}) + "\n" for p in prompts))


def _damage_models(root: Path) -> None:
    def copy(name: str, change: Callable[[dict[str, torch.Tensor]], object], **config: object) -> Path:
        tensors = load_file(root / "model/model.safetensors")
        change(tensors)
        for file in (root / "model").iterdir():
            (root / name).mkdir(exist_ok=True)
            (root / name / file.name).write_bytes(file.read_bytes())
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((root / "model/config.json").read_text()) | config
        (root / name / "config.json").write_text(json.dumps(settings))
        return root / name

    def refit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.bonus.weight"] = torch.zeros(2, 2)
        tensors["model.norm.weight"] = torch.ones(63)

    def quantize_oddly(tensors: dict[str, torch.Tensor]) -> None:
        """Bitsandbytes' form, with another map: only the rank that encodes the first block reads it."""
        name = "model.layers.0.self_attn.q_proj.weight"
        rows, columns = tensors[name].shape
        note = {"quant_type": "nf4", "blocksize": 64, "shape": [rows, columns], "dtype": "float32"}
        tensors[name] = torch.zeros(rows * columns // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.ones(rows * columns // 64)
        tensors[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(note).encode())).byte()

    copy("refit", refit)
    copy("nan_linear", lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(torch.nan))
    # In a norm, which is not quantized.
    copy("nan", lambda t: t["model.layers.1.input_layernorm.weight"][5].fill_(torch.nan))
    vocabulary = json.loads((root / "model/tokenizer.json").read_text())["model"]["vocab"]
    copy("nan_token", lambda t: t["model.embed_tokens.weight"][vocabulary["~"]].fill_(torch.nan))
    copy("steep", lambda t: t["lm_head.weight"].mul_(3))
    copy("no_config", lambda t: None).joinpath("config.json").unlink()
    for file in copy("no_tokenizer", lambda t: None).glob("tokenizer*"):
        file.unlink()
    (copy("odd_config", lambda t: None) / "config.json").write_text("{")
    index = copy("odd_index", lambda t: None) / "model.safetensors.index.json"
    index.write_text('{"weight_map": ')
    index.with_name("model.safetensors").unlink()  # which would be read before it
    cut = copy("cut", lambda t: None) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    copy("odd_map", quantize_oddly, quantization_config=method)


def _damage_data(root: Path) -> None:
    good = (root / "rows.jsonl").read_text().splitlines()
    (root / "malformed.jsonl").write_text("\n".join([*good[:2], '{"prompt": "no end', *good[3:]]))
    (root / "empty.jsonl").write_text("")
    _write_rows(root / "long.jsonl", ["x" * 100] * 4)
    prompts = [f"row {i}" for i in range(ROWS)]
    prompts[poisoned_row()] = "row ~"
    _write_rows(root / "poisoned.jsonl", prompts)
    (root / "file").write_text("in the way")
    (root / "model.gguf").write_bytes(b"GGUF")
    (root / "rows").mkdir()
    (root / "rows/rows.jsonl").write_text("\n".join(good))
    (root / "full").mkdir()
    (root / "full/adapter_config.json").write_text("{}")
    (root / "bad.yaml").write_text("lora_rank: 8\n  lora_alpha: [\n")


def poisoned_row() -> int:
    """The dataset's number of a row that the seed puts into the step after STEPS_BEFORE_POISON, of 4 rows each."""
    return int(np.random.default_rng([SEED, 0]).permutation(ROWS)[STEPS_BEFORE_POISON * 4])


def _arguments(material: Material, folder: Path, **changes: str) -> list[str]:
    """A command line that works, 4 rows a step over two ranks, with options added or replaced."""
    options = {
        "model_name": material.path("model"),
        "dataset": material.path("rows.jsonl"),
        "output_dir": str(folder),
        "batch_size": "2",
        "lr_scheduler": "constant",
        "precision": "fp32",
        "lora_rank": "4",
        "context_length": "64",
        "seed": str(SEED),
    }
    return [text for name, value in (options | changes).items() for text in (f"--{name}", value)]


# name -> (what is changed of a command line that works, words that the one line must have)
MISTAKES: dict[str, tuple[dict[str, str], list[str]]] = {
    "unknown option": ({"lora_rnk": "8"}, ["--lora_rnk 8", "did you mean lora_rank?"]),
    "wrong value": ({"lora_rank": "zero"}, ["--lora_rank zero", "whole number"]),
    "no config file": ({"config": "{root}/nowhere.yaml"}, ["nowhere.yaml", "No such file"]),
    "malformed config file": ({"config": "{root}/bad.yaml"}, ["bad.yaml", "line 2"]),
    "no dataset file": ({"dataset": "{root}/nowhere.jsonl"}, ["nowhere.jsonl", "no such file"]),
    "malformed JSONL": ({"dataset": "{root}/malformed.jsonl"}, ["malformed.jsonl", "line 3", "malformed JSON"]),
    "empty dataset": ({"dataset": "{root}/empty.jsonl"}, ["empty.jsonl", "no rows"]),
    "no labels": ({"dataset": "{root}/long.jsonl"}, ["long.jsonl", "none of its 4 rows", "context_length 64"]),
    "context beyond the model": ({"context_length": "300"}, ["context_length 300", "at most 256"]),
    "unknown target": (
        {"lora_target_modules": "q_proj,quarry_proj"},
        ["lora_target_modules: quarry_proj matches no", "q_proj", "o_proj", "down_proj"],
    ),
    "output_dir is a file": ({"output_dir": "{root}/file"}, ["output_dir", "{root}/file", "choose another folder"]),
    "output_dir below a file": ({"output_dir": "{root}/file/out"}, ["output_dir", "file/out", "choose another folder"]),
    "output_dir of the model": (
        {"output_dir": "{root}/model", "overwrite_output_dir": "true"},
        ["output_dir: {root}/model is the folder of the model, whose files would be replaced"],
    ),
    "output_dir of the rows": (
        {"output_dir": "{root}/rows/", "dataset": "{root}/rows.jsonl,{root}/rows", "overwrite_output_dir": "true"},
        ["output_dir: {root}/rows is the folder of the rows, whose files would be replaced"],
    ),
    "profile below a file": (
        {"profile": "true", "profiling_output": "{root}/file/x"},
        ["profiling_output: {root}/file/x cannot be written", "choose another folder"],
    ),
    "output_dir in use": ({"output_dir": "{root}/full"}, ["full is not empty", "--overwrite_output_dir true"]),
    "tensors that do not fit": (
        {"model_name": "{root}/refit"},
        [
            "missing: model.layers.1.mlp.up_proj.weight",
            "unknown: model.layers.2.mlp.bonus.weight",
            "model.norm.weight is [63] and should be [64]",
        ],
    ),
    "shard gone": ({"model_name": "{root}/shard_gone"}, ["lacks model-00002-", "index.json", "download the rest"]),
    "damaged index": ({"model_name": "{root}/odd_index"}, ["index.json is damaged", "download it again"]),
    "file cut short": ({"model_name": "{root}/cut"}, ["cut/model.safetensors cannot be read", "download it again"]),
    "NaN to be quantized": (
        {"model_name": "{root}/nan_linear"},
        ["model.layers.1.mlp.up_proj.weight of the checkpoint holds NaN or infinity", "download it again"],
    ),
    "no config.json": ({"model_name": "{root}/no_config"}, ["no_config has no config.json (it holds gen"]),
    "damaged config.json": ({"model_name": "{root}/odd_config"}, ["odd_config has no readable config.json"]),
    "a file for a model": ({"model_name": "{root}/model/config.json"}, ["config.json is a file;", "set model_name to"]),
    "GGUF for a model": ({"model_name": "{root}/model.gguf"}, ["model.gguf is a GGUF file, which is not trained over"]),
    "no folder of a model": ({"model_name": "{root}/nowhere"}, ["no folder {root}/nowhere", "the current folder is"]),
    "no tokenizer": ({"model_name": "{root}/no_tokenizer"}, ["tokenizer could not be loaded", "tokenizer_config.json"]),
    "disk full at once": ({}, ["output_dir", "File too large", "free some space"]),
    "one rank's tensor": (
        {"model_name": "{root}/odd_map", "double_quant": "false"},
        ["model.layers.0.self_attn.q_proj.weight.quant_map", "standard map"],
    ),
}

# name -> (changes, the largest file that may be written, words of the one line): exit code 1
STOPS: dict[str, tuple[dict[str, str], int | None, list[str]]] = {
    "NaN at once": (
        {"model_name": "{root}/nan"},
        None,
        ["step 1: the loss is nan, so nothing was updated", "rank 0: ", "rank 1: ", "checkpoint itself may be damaged"],
    ),
    "NaN later": (
        {"model_name": "{root}/nan_token", "dataset": "{root}/poisoned.jsonl", "optimizer": "fused_adamw"},
        None,
        [
            f"step {STEPS_BEFORE_POISON + 1}: the loss is nan",
            ". Look at these rows, or lower lr. The adapter",  # in fp32 nothing is wider
            f"The adapter as of step {STEPS_BEFORE_POISON} is saved in ",
        ],
    ),
    "disk full": (
        {"num_epochs": "4", "overwrite_output_dir": "true"},
        4_000,  # bytes: enough for the run's options, not for the record of all its steps
        ["output_dir: the adapter could not be saved in ", "File too large", "free some space"],
    ),
    "folder in the way": (
        {"max_steps": "1", "overwrite_output_dir": "true"},
        None,
        ["output_dir: the adapter could not be saved in ", "It is in ", "move it from there"],
    ),
}

GOES_WELL: dict[str, dict[str, str]] = {
    "before the poison": {
        "model_name": "{root}/nan_token",
        "dataset": "{root}/poisoned.jsonl",
        "optimizer": "fused_adamw",
        "max_steps": str(STEPS_BEFORE_POISON),
    },
    "overflow": {"model_name": "{root}/steep", "precision": "fp16_autocast", "optimizer": "sgd"},
    "overflow, queued": {"model_name": "{root}/steep", "precision": "fp16_autocast", "optimizer": "fused_adamw"},
}


@pytest.fixture(scope="module")
def ended(material: Material, tmp_path_factory) -> dict[str, Ended]:
    """Every case of the tables above, in one launch of two ranks."""
    results = tmp_path_factory.mktemp("results")
    outputs = tmp_path_factory.mktemp("outputs")
    (outputs / "disk full").mkdir()
    (outputs / "disk full" / ADAPTER).write_bytes(b"an earlier run's adapter")
    (outputs / "folder in the way" / ADAPTER / "of somebody").mkdir(parents=True)
    limits = {name: largest for name, (_, largest, _) in STOPS.items()} | {"disk full at once": 100}
    cases, folders = {}, {}
    for name, changes in [(n, row[0]) for n, row in (MISTAKES | STOPS).items()] + list(GOES_WELL.items()):
        filled = {option: value.format(root=material.root) for option, value in changes.items()}
        folders[name] = Path(filled.get("output_dir", outputs / name))
        arguments = _arguments(material, folders[name], **filled)
        cases[name] = {"arguments": arguments, "largest_file": limits.get(name)}
    (results / "cases.json").write_text(json.dumps(cases))
    done = run_torchrun(
        ROOT / "tests/support/ranks_of_cases.py", args=[str(results / "cases.json"), str(results)], timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    of = {name: [json.loads((results / f"{name}.{rank}.json").read_text()) for rank in range(2)] for name in cases}
    return {
        name: Ended([r["code"] for r in ranks], [r["out"] for r in ranks], [r["err"] for r in ranks], folders[name])
        for name, ranks in of.items()
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_of_one_rank_before_anything_is_loaded(name, ended, material):
    case, words = ended[name], MISTAKES[name][1]
    assert case.codes == [2, 2], case.everything
    assert len(case.lines) == 1, case.everything
    assert case.lines[0].startswith("train.py: ")
    for word in words:
        assert word.format(root=material.root) in case.lines[0]
    assert "Traceback" not in case.everything
    if case.folder.is_dir():
        assert not list(case.folder.glob("adapter_model*"))


def test_what_was_in_the_way_is_untouched(ended, material):
    assert ended["output_dir in use"].codes == [2, 2]
    assert [file.name for file in Path(material.path("full")).iterdir()] == ["adapter_config.json"]
    assert Path(material.path("file")).read_text() == "in the way"


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_in_the_middle_is_one_line_with_advice(name, ended):
    case, words = ended[name], STOPS[name][2]
    assert case.codes == [1, 1], case.everything
    assert len(case.lines) == 1, case.everything
    assert case.lines[0].startswith("train.py: ")
    for word in words:
        assert word in case.lines[0]
    assert "Traceback" not in case.everything


def test_nothing_is_saved_of_a_first_step_that_failed(ended):
    assert not (ended["NaN at once"].folder / ADAPTER).exists()


def test_the_rows_of_a_bad_step_are_named_and_the_last_good_step_is_saved(ended):
    case = ended["NaN later"]
    blamed = re.search(r"counted from 0\): rank \d: ([\d, ]+)\. ", case.lines[0])
    assert blamed is not None, case.lines
    assert poisoned_row() in [int(row) for row in blamed[1].split(", ")]
    assert len(blamed[1].split(", ")) == 2, "the other rank's rows are blamed as well"
    saved, good = (load_file(c.folder / ADAPTER) for c in (case, ended["before the poison"]))
    assert ended["before the poison"].codes == [0, 0], ended["before the poison"].everything
    assert saved.keys() == good.keys()
    assert all(torch.equal(saved[name], good[name]) for name in good)
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name), "nothing was learnt"


@pytest.mark.parametrize(("name", "steps"), [("NaN at once", 0), ("NaN later", STEPS_BEFORE_POISON)])
def test_a_step_without_a_loss_is_in_the_record_and_in_the_picture(name, steps, ended):
    *good, last = strict_records(ended[name].folder)
    assert [record["step"] for record in good] == [*range(1, steps + 1)]
    assert all(math.isfinite(record["loss"]) and "stopped" not in record for record in good)
    assert (last["step"], last["loss"], last["stopped"]) == (steps + 1, None, "the loss is nan")
    assert (ended[name].folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def strict_records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, which are JSON as others read it too: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_old_adapter_stays_whole_on_a_full_disk(ended):
    folder = ended["disk full"].folder
    assert (folder / ADAPTER).read_bytes() == b"an earlier run's adapter"
    assert not list(folder.glob(".*")), "what could not be written whole is still there"


def test_a_full_disk_ends_the_record_of_the_steps_but_not_the_run(ended):
    case = ended["disk full"]
    assert case.out[0].count("metrics.jsonl cannot be written any more (File too large)") == 1
    assert f"step {4 * ROWS // 4}/{4 * ROWS // 4}" in case.out[0]


def test_an_adapter_that_cannot_be_saved_where_it_should_is_saved_elsewhere(ended):
    case = ended["folder in the way"]
    place = re.search(r"It is in (\S+) instead", case.lines[0])
    assert place is not None, case.lines
    try:
        assert load_file(Path(place[1]) / ADAPTER).keys() == load_file(ended["NaN later"].folder / ADAPTER).keys()
        assert (Path(place[1]) / "adapter_config.json").is_file()
    finally:
        shutil.rmtree(place[1])


@pytest.mark.parametrize("name", ["overflow", "overflow, queued"])
def test_an_overflow_of_float16_leaves_the_step_out_and_halves_the_scale(name, ended):
    case = ended[name]
    assert case.codes == [0, 0], case.everything
    told = re.findall(
        r"step (\d+): float16 gradients overflowed, so it was left out; the loss scale is (\d+)", case.out[0]
    )
    assert told, case.everything
    assert [int(scale) for _, scale in told] == [2**16 // 2**n for n in range(1, len(told) + 1)]
    records = strict_records(case.folder)
    assert len(records) == ROWS // 4
    assert [record["step"] for record in records if record["grad_norm"] is None] == [int(step) for step, _ in told]
    assert f"{len(told)} of them left out: float16 gradients overflowed" in case.out[0]
    assert len(told) < len(records), "no scale was small enough, so no update was tried"
    assert "lr_scheduler" not in case.everything


def test_bfloat16_is_refused_by_name_on_a_card_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    card = torch.device("cuda", 0)
    for mode in ("bf16", "bf16_autocast", "bf16_buffers_autocast"):
        with pytest.raises(UserError, match=rf"^precision: {mode} needs bfloat16.*Tesla T4.*--precision fp16_autocast"):
            precision_of(mode, card)
    assert precision_of("fp16_autocast", card).compute is torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert precision_of("bf16", card).compute is torch.bfloat16


def test_what_is_advised_against_nan_is_wider_and_runs_on_the_same_card():
    told = {mode: precision.wider.split(" ")[0] for mode, precision in MODES.items()}
    assert told == {
        "fp32": "",
        "bf16": "bf16_autocast",
        "bf16_buffers_autocast": "bf16_autocast",
        "bf16_autocast": "fp32",
        "fp16_autocast": "fp32",  # such a card may not have bfloat16
    }


def test_gpu_memory_that_runs_out_before_the_first_step_is_told_in_a_line():
    with (
        pytest.raises(TrainingStopped, match=r"^rank 0: GPU memory ran out .*\(CUDA out of memory.*--gpu_memory_gib"),
        open_world(LaunchOptions(), seed=1),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EIO, "Input/output error", "/data/x"), "[Errno 5] Input/output error: '/data/x'"),
        (MemoryError(), "host memory: MemoryError"),
    ],
)
def test_what_the_system_refuses_before_the_first_step_is_told_in_a_line(error, told):
    with (
        pytest.raises(TrainingStopped, match=rf"^rank 0: the system refused .*\({re.escape(told)}\); see to that"),
        open_world(LaunchOptions(), seed=1),
    ):
        raise error


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(FileNotFoundError), open_world(LaunchOptions(), seed=1):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")


def test_an_unreachable_hub_is_noticed_once_and_only_then():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody listens there
        refused = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        note = go_offline_if_unreachable(refused)
        assert note is not None
        assert refused["HF_ENDPOINT"] in note
        assert refused["HF_HUB_OFFLINE"] == "1"
        asked_for = {"HF_ENDPOINT": refused["HF_ENDPOINT"], "TRANSFORMERS_OFFLINE": "0"}
        assert go_offline_if_unreachable(asked_for) is None
        assert "HF_HUB_OFFLINE" not in asked_for
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to everything
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answered = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        assert go_offline_if_unreachable(answered) is None
        assert "HF_HUB_OFFLINE" not in answered
    finally:
        server.shutdown()
        server.server_close()


def _own_lines(text: str) -> list[str]:
    """Without what torchrun says itself about ranks that ended."""
    ours = text.split("Traceback (most recent call last)")[0].splitlines()
    return [line for line in ours if line.strip() and not re.match(r"[EW]\d{4} [\d:.]+ ", line)]


def test_a_model_that_is_nowhere_is_told_in_one_line_and_in_seconds(tmp_path):
    hub = {"HF_HUB_OFFLINE": None, "HF_ENDPOINT": "http://127.0.0.1:9"}  # the discard port: nobody listens
    arguments = ["--model_name", "nobody/nothing", "--dataset", "dummy", "--output_dir", str(tmp_path / "out")]
    start = time.monotonic()
    done = run_torchrun(ROOT / "train.py", nproc=1, args=arguments, env=hub)
    assert time.monotonic() - start < 60  # nearly all of it is importing; the client's retries alone are a minute
    assert done.returncode != 0
    lines = _own_lines(done.stderr)
    assert len(lines) == 1, done.stderr
    assert "model_name: nobody/nothing is neither a local folder nor a model the hub gives" in lines[0]
    assert "check the name, the network" in lines[0]
    assert done.stdout == ""


class Training:
    """A long run of two ranks under torchrun, somewhere in the middle of its steps."""

    def __init__(self, material: Material, folder: Path, **changes: str) -> None:
        self.folder = folder
        self.start = time.monotonic()
        arguments = _arguments(material, folder, num_epochs="100000", batch_size="4", **changes)
        self.process = start_torchrun(ROOT / "train.py", args=arguments)
        try:
            while self.steps() < 4:
                assert self.process.poll() is None, "it ended"
                assert time.monotonic() - self.start < 120, "no four steps in 120 s"
                time.sleep(0.1)
            self.ranks = ranks_of(self.process)
            assert self.ranks.keys() == {0, 1}
        except BaseException as error:
            raise type(error)(f"{error}\n{stacks(self.process)}") from None

    def steps(self) -> int:
        record = self.folder / "metrics.jsonl"
        return record.read_text().count("\n") if record.exists() else 0

    def end(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Waits for the end, at which no process may be left."""
        done = finish(self.process, timeout)
        assert not [rank for rank, process in self.ranks.items() if process.is_running()]
        return done

    def saved_step(self, text: str) -> int:
        found = re.search(r"adapter as of step (\d+)", text)
        assert found is not None, text
        return int(found[1])


def _opens_in_peft(material: Material, folder: Path) -> None:
    """The adapter is whole, was trained, and PEFT takes every one of its tensors."""
    model = AutoModelForCausalLM.from_pretrained(material.path("model"))
    opened = PeftModel.from_pretrained(model, folder)
    inside = {name.replace(".default", ""): p for name, p in opened.named_parameters() if "lora_" in name}
    saved = load_file(folder / ADAPTER)
    assert inside.keys() == saved.keys()
    assert all(torch.equal(inside[name], saved[name]) for name in saved)
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    assert {file.name for file in folder.glob(".*")} <= {LOCK}, "a killed rank 0 cannot take its lock away"
    assert (folder / ADAPTER).stat().st_mode == (folder / "metrics.jsonl").stat().st_mode


@pytest.mark.parametrize(("victim", "optimizer"), [(0, "fused_adamw"), (1, "adamw")])  # one queues its updates here
def test_a_killed_rank_ends_the_others_with_a_message_and_what_was_learnt_is_saved(
    material, tmp_path, victim, optimizer
):
    before = set(os.listdir("/dev/shm"))
    run = Training(material, tmp_path / "out", use_cpu_offload="true", optimizer=optimizer)
    run.ranks[victim].kill()
    done = run.end(timeout=60)
    assert set(os.listdir("/dev/shm")) <= before, "shared memory outlives the job"
    assert done.returncode == 1
    # Told by the broken connection, or, inside a GPU's exchange, by the time that it takes.
    left = rf"rank {1 - victim}( stopped because another rank ended|: no step ended within \d+ s)"
    assert re.search(left, done.stderr), done.stderr
    step = run.saved_step(done.stdout + done.stderr)
    assert 3 <= run.steps() - 1 <= step <= run.steps() + 1
    assert 'train.py", line' not in done.stderr, "a traceback of ours"
    _opens_in_peft(material, run.folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "hangup"])
def test_a_signal_saves_the_adapter_after_the_step(material, tmp_path, number):
    run = Training(material, tmp_path / "out")
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)  # as a terminal does: to all of torchrun's process group
    else:
        run.process.send_signal(number)
    done = run.end(timeout=60)
    assert done.stderr.count(f"{number.name}: stopping after this step, then saving") == 1
    assert f"trained {run.steps()} of " in done.stdout
    assert f"saved   {run.folder}" in done.stdout
    assert "rank 0 stopped" not in done.stderr
    assert "train.py:" not in done.stderr
    _opens_in_peft(material, run.folder)
