"""What a run prints and records of rows, tokens, steps, epochs and time, against counts made from the dataset's file.

The counts here know nothing of the program's: a token of the tiny tokenizer is a byte of ASCII text."""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from transformers import LlamaConfig

import train
from fsdp_qlora.training import step as step_module
from tests.support import tiny
from tests.support.runs import Options, Run, flags
from tests.support.torchrun import ROOT, run_torchrun

CONTEXT, LR = 40, 1e-3


@dataclass(frozen=True)
class Counts:
    """What an epoch comes to."""

    rows: int
    tokens: int
    labels: int
    longest: int


def save_rows(file: Path) -> Counts:
    """Save rows of very unequal lengths; one is cut at the context, of one nothing is left to learn."""
    tiny.save_rows(file, 17)
    with file.open("a") as out:
        out.write(json.dumps({"prompt": "long:", "completion": "y" * 2 * CONTEXT}) + "\n")
        out.write(json.dumps({"prompt": "x" * 2 * CONTEXT, "completion": "beyond"}) + "\n")
    lengths = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        before, after = 1 + len(row["prompt"]), len(row["completion"]) + 1  # BOS before, EOS after
        tokens = min(before + after, CONTEXT)
        if tokens > before:
            lengths.append((tokens, tokens - before))
    assert len(lengths) == 18
    assert len({tokens for tokens, _ in lengths}) > 8, "so that a row seen twice in another's place changes the sums"
    tokens, labels = zip(*lengths, strict=True)
    return Counts(len(lengths), sum(tokens), sum(labels), max(tokens))


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Options, Counts]:
    folder = tmp_path_factory.mktemp("truth")
    counts = save_rows(folder / "rows.jsonl")
    options: Options = {
        "model_name": tiny.save_model(LlamaConfig(**tiny.SHAPE | {"num_hidden_layers": 1}), folder / "model"),
        "dataset": folder / "rows.jsonl", "rows_cache": "null", "context_length": CONTEXT, "lora_rank": 2,
        "fused": "false", "precision": "fp32", "lr": LR, "log_to": "stdout",
    }  # fmt: skip
    return options, counts


def check(said: str, run: Run, counts: Counts, per_step: int, steps: int, epochs: int) -> None:
    """Compare all that a run says of itself with `counts`. epochs: whole ones in its `steps`."""
    records, per_epoch = run.records, -(-counts.rows // per_step)
    sizes = [min(per_step, counts.rows - i * per_step) for i in range(per_epoch)]

    # each record
    assert [record["step"] for record in records] == [*range(1, steps + 1)]
    assert [record["rows"] for record in records] == [*itertools.islice(itertools.cycle(sizes), steps)]
    rows_so_far = list(itertools.accumulate(record["rows"] for record in records))
    assert [record["epoch"] for record in records] == pytest.approx([rows / counts.rows for rows in rows_so_far])
    for epoch in range(epochs):
        of_epoch = records[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sum(record["rows"] for record in of_epoch) == counts.rows
        assert sum(record["tokens"] for record in of_epoch) == counts.tokens
        assert sum(record["label_tokens"] for record in of_epoch) == counts.labels
        assert of_epoch[-1]["epoch"] == epoch + 1, "exactly"
        assert all(record["epoch"] < epoch + 1 for record in of_epoch[:-1])
    for record in records:
        assert 0 < record["label_tokens"] < record["tokens"]
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"], rel=1e-2)

    # before the first step
    counted = r"(\d+) rows? \(.*?, ([\d,]+) tokens, ([\d,]+) of them labels, longest row (\d+)"
    data = re.search(rf"^data +.*: {counted}", said, re.M)
    assert data is not None, said
    assert [int(number.replace(",", "")) for number in data.groups()] == [
        counts.rows, counts.tokens, counts.labels, counts.longest,
    ]  # fmt: skip
    plan = re.search(r"^run +(\d+) steps? of (\d+) rows.*?, ([\d.]+) epochs?\b", said, re.M)
    assert plan is not None, said
    assert (int(plan[1]), int(plan[2])) == (steps, per_step)
    assert float(plan[3]) == pytest.approx(rows_so_far[-1] / counts.rows, abs=1e-4)
    if sizes[-1] != per_step:
        assert f"an epoch's last of {sizes[-1]}" in said

    # each line
    lines = re.findall(r"^step +(\d+)/(\d+)  loss (\S+)  lr (\S+)  ([\d,]+) tok/s  .*?  ([\d:]+) left", said, re.M)
    assert [(int(step), int(total)) for step, total, *_ in lines] == [(step, steps) for step in range(1, steps + 1)]
    for (_, _, loss, lr, speed, _), record in zip(lines, records, strict=True):
        assert loss == f"{record['loss']:.4f}"
        assert lr == f"{record['lr']:.2e}"
        assert int(speed.replace(",", "")) == pytest.approx(record["tokens"] / record["seconds"], rel=0.02, abs=1)
    assert lines[-1][-1] == "0:00"

    # the end
    trained = re.search(r"^trained (\d+) steps? in (\S+), ([\d,]+) tokens, median ([\d,]+) tok/s", said, re.M)
    assert trained is not None, said
    assert int(trained[1]) == steps
    assert int(trained[3].replace(",", "")) == sum(record["tokens"] for record in records)
    adapters = re.search(r"^adapters .*?: ([\d,]+) parameters", said, re.M)
    assert adapters is not None, said
    assert int(adapters[1].replace(",", "")) == sum(tensor.numel() for tensor in run.tensors.values())


def train_alone(options: Options, folder: Path, capsys) -> tuple[str, Run]:
    assert train.main(flags(options | {"output_dir": folder})) == 0
    return capsys.readouterr().out, Run(folder)


def test_two_ranks_that_accumulate_over_three_epochs_tell_the_truth(material, tmp_path):
    """18 rows, 2 x 2 x 2 a step: the last of an epoch has two rows."""
    options, counts = material
    more: Options = {"batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 3, "output_dir": tmp_path / "out"}
    done = run_torchrun(ROOT / "train.py", 2, flags(options | more))
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout, Run(tmp_path / "out"), counts, per_step=8, steps=9, epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "per_step", "steps", "epochs"),
    [
        ({"batch_size": 4, "num_epochs": 2, "max_steps": 11}, 4, 10, 2),  # 18 rows: the last of an epoch has two
        ({"batch_size": 6, "num_epochs": 5, "max_steps": 4}, 6, 4, 1),  # the second epoch ends in its middle
        ({"batch_size": 5, "gradient_accumulation_steps": 6}, 30, 1, 1),  # more rows a step than there are
    ],
)
def test_a_run_tells_the_truth(more, per_step, steps, epochs, material, tmp_path, capsys):
    options, counts = material
    said, run = train_alone(options | more, tmp_path / "out", capsys)
    check(said, run, counts, per_step, steps, epochs)
    assert ("num_epochs 2 ends the run before max_steps 11" in said) == (more.get("max_steps") == 11)


@pytest.mark.slow
def test_the_lr_that_is_told_is_the_lr_that_is_used(material, tmp_path, capsys):
    used = list[float]()

    def note(optimizer: Optimizer, *_: object) -> None:
        (lr,) = {group["lr"] for group in optimizer.param_groups}
        used.append(lr)

    options, _ = material
    steps, warm_up = 10, 3
    handle = register_optimizer_step_pre_hook(note)
    try:
        more: Options = {"batch_size": 4, "num_epochs": 2, "lr_scheduler": "cosine", "warmup_ratio": warm_up / steps}
        _, run = train_alone(options | more, tmp_path / "out", capsys)
    finally:
        handle.remove()
    assert [record["lr"] for record in run.records] == used
    fall = [(1 + math.cos(math.pi * i / (steps - warm_up))) / 2 for i in range(steps - warm_up)]
    assert used == pytest.approx([LR * share for share in [0, 1 / 3, 2 / 3, *fall]])


@pytest.mark.slow
def test_time_is_counted_from_the_end_of_one_step_to_the_end_of_the_next(material, tmp_path, capsys, monkeypatch):
    """By a clock that goes on by a minute whenever it is read: nothing between two steps is left out or told twice."""
    read = list[float]()

    def clock() -> float:
        read.append(60.0 * (len(read) + 1))
        return read[-1]

    monkeypatch.setattr(step_module, "time", SimpleNamespace(perf_counter=clock))
    options, _ = material
    said, run = train_alone(options | {"batch_size": 4, "num_epochs": 2}, tmp_path / "out", capsys)
    seconds = [record["seconds"] for record in run.records]
    assert seconds == [60.0] * 10
    assert sum(seconds) == read[-1] - read[0]
    assert "trained 10 steps in 10:00, " in said
    assert re.findall(r"([\d:]+) left", said) == [f"{left}:00" for left in range(9, -1, -1)]
    speeds = [record["tokens"] / 60 for record in run.records]
    assert [record["tokens_per_second"] for record in run.records] == pytest.approx(speeds, abs=0.005)
    typical = sorted(speeds[3:])
    assert f"median {typical[3]:,.0f} tok/s after warm-up" in said


@pytest.mark.slow
def test_the_dummy_dataset_is_counted_as_any(material, tmp_path, capsys):
    options, _ = material
    dummy: Options = {"dataset": "dummy", "dataset_samples": 5, "batch_size": 2}
    said, run = train_alone({k: v for k, v in options.items() if k != "rows_cache"} | dummy, tmp_path / "out", capsys)
    told = re.search(r"^data +.*: 5 rows \(.*?, ([\d,]+) tokens, ([\d,]+) of them labels", said, re.M)
    assert told is not None, said
    tokens, labels = (int(number.replace(",", "")) for number in told.groups())
    assert sum(record["tokens"] for record in run.records) == tokens
    assert sum(record["label_tokens"] for record in run.records) == labels
    assert load_file(run.folder / "adapter_model.safetensors")
