"""Evaluation while training: training goes on to the same bits, and the loss is that of PEFT over the same rows."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig

import train
from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.config.parse import parse
from fsdp_qlora.data.batches import load_rows
from fsdp_qlora.errors import TrainingStopped
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.training import loop
from fsdp_qlora.training.evaluate import Evaluated, Evaluator
from fsdp_qlora.training.evaluations import check_evaluations
from tests.support import plain, tiny
from tests.support.built import built
from tests.support.runs import Options, Run, flags, run_alone, run_ranks

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
EXACT = 1e-5  # of a float32 loss, relative
ROWS, OTHERS = 24, 9
OPTIONS = {"lora_rank": 8, "lr": 5e-3, "precision": "fp32", "context_length": 64, "rows_cache": "null"}
STREAMED = {"use_cpu_offload": True, "resident_blocks": 0}
EVALUATED = {"eval_steps": 1, "eval_on_start": True}
# Where the bytes lie and what computes them, with dropout, whose random numbers must stay the same.
PLACED: dict[str, Options] = {
    "ddp": {"sharding_strategy": "ddp"},
    "shard_grad_op": {"sharding_strategy": "shard_grad_op", "use_cpu_offload": True, "cpu_offload_by": "fsdp2"},
    "streamed": STREAMED | {"use_activation_cpu_offload": True},
}
GENERIC: dict[str, Options] = {
    "generic-sharded": {"fused": "false", "sharding_strategy": "full_shard"},
    "generic-streamed": {"fused": "false"} | STREAMED,
}
ACCUMULATED = {"batch_size": 1, "gradient_accumulation_steps": 2, "no_sync": True}
SCALED: Options = {"precision": "fp16_autocast", "sharding_strategy": "full_shard"} | ACCUMULATED
CASES = PLACED | GENERIC | {"scaled": SCALED}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    """A model, rows, and other rows, of which two are trained on and others are longer than any that is."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny.save_model(LlamaConfig(**tiny.SHAPE), folder / "model")
    rows = tiny.save_rows(folder / "rows.jsonl", ROWS).read_text().splitlines(keepends=True)
    short = [line for line in rows if len(line) < 70]
    (folder / "rows.jsonl").write_text("".join(short))
    more = tiny.save_rows(folder / "others.jsonl", ROWS + OTHERS).read_text().splitlines(keepends=True)
    assert max(map(len, more[ROWS:])) > max(map(len, short)) + 8
    (folder / "others.jsonl").write_text("".join([short[0], *more[ROWS:], short[1]]))
    return OPTIONS | {"model_name": folder / "model", "dataset": folder / "rows.jsonl"}


def others(options: Options) -> Options:
    return EVALUATED | {"eval_dataset": Path(str(options["dataset"])).parent / "others.jsonl"}


@pytest.fixture(scope="module")
def two(options, tmp_path_factory) -> dict[str, Run]:
    """Every case on two ranks without evaluation, and with it by `name-evaluated`."""
    base = options | {"batch_size": 2, "lora_dropout": 0.3, "max_steps": 2}
    without = {name: base | more for name, more in CASES.items()}
    evaluated = {f"{name}-evaluated": case | others(options) for name, case in without.items()}
    return run_ranks(without | evaluated, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Run:
    """One rank, without dropout, evaluated on other rows."""
    more = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    return run_alone(options | others(options) | more, tmp_path_factory.mktemp("one"))


def same_training(with_it: Run, without: Run) -> None:
    assert [(r["loss"], r["grad_norm"], r["lr"]) for r in with_it.records] == [
        (r["loss"], r["grad_norm"], r["lr"]) for r in without.records
    ]
    assert len(without.records) == 2
    assert with_it.tensors.keys() == without.tensors.keys()
    for name, tensor in without.tensors.items():
        assert torch.equal(with_it.tensors[name], tensor), name


@pytest.mark.parametrize("name", CASES)
def test_evaluation_changes_no_bit_of_training_on_two_ranks(two, name):
    same_training(two[f"{name}-evaluated"], two[name])
    assert [e["step"] for e in two[f"{name}-evaluated"].evaluations] == [0, 1, 2]
    losses = [e["eval_loss"] for e in two[f"{name}-evaluated"].evaluations]
    assert len(set(losses)) == 3


def test_evaluation_changes_no_bit_of_training_alone(options, tmp_path):
    base = options | {"batch_size": 4, "lora_dropout": 0.3, "max_steps": 2}
    evaluated = run_alone(base | others(options), tmp_path / "evaluated")
    same_training(evaluated, run_alone(base, tmp_path / "without"))
    assert len(evaluated.evaluations) == 3


def test_the_loss_is_the_same_wherever_the_base_lies_and_on_one_rank(two, alone):
    for kinds in (list(PLACED), list(GENERIC)):
        found = [[e["eval_loss"] for e in two[f"{name}-evaluated"].evaluations] for name in kinds]
        assert all(losses == found[0] for losses in found)
        assert alone.evaluations[0]["eval_loss"] == pytest.approx(found[0][0], rel=EXACT)
    assert alone.evaluations[0]["eval_loss"] == two["ddp-evaluated"].evaluations[0]["eval_loss"]


def peft_loss(folder: Path, model: Path, file: Path, left_out: set[str]) -> tuple[float, int]:
    """Return (mean loss over the label tokens, these tokens) of a saved adapter opened by PEFT, row by row."""
    base = plain.load_base(model, plain.Recipe())
    opened = PeftModel.from_pretrained(base, folder).eval()
    kept = file.with_suffix(".kept")
    kept.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if line not in left_out))
    rows = plain.read_rows(kept, model, 64)
    with torch.no_grad():
        total = sum(plain.summed_loss(opened, ids, labels).item() for ids, labels in rows)
    count = sum(label != -100 for _, labels in rows for label in labels)
    return total / count, count


def test_the_loss_is_that_of_peft_over_the_same_rows(options, alone):
    trained = set(Path(str(options["dataset"])).read_text().splitlines(keepends=True))
    file = Path(str(others(options)["eval_dataset"]))
    truth, count = peft_loss(alone.folder, Path(str(options["model_name"])), file, trained)
    last = alone.evaluations[-1]
    assert last["eval_loss"] == pytest.approx(truth, rel=EXACT)
    assert last["eval_perplexity"] == pytest.approx(math.exp(truth), rel=1e-3)
    assert (last["eval_rows"], last["eval_label_tokens"]) == (OTHERS, count)
    assert last["eval_loss"] < alone.evaluations[0]["eval_loss"] - 0.1, "nothing was learnt"


def test_a_plain_loop_over_the_rows_gives_the_same_bits_and_nothing_is_left_behind(options):
    tokenizer = AutoTokenizer.from_pretrained(options["model_name"])
    rows = load_rows(DataOptions(str(options["dataset"]), rows_cache=None, context_length=64), tokenizer, 264)
    with built(options | {"lora_dropout": 0.3}) as ours:
        modes = [module.training for module in ours.model.modules()]
        state = torch.get_rng_state()
        found = Evaluator(ours.model, rows, 1, ours.world)(lambda: False)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in ours.model.modules()] == modes
        assert any(modes)
        assert Evaluator(ours.model, rows, 1, ours.world)(lambda: True) is None
        assert [module.training for module in ours.model.modules()] == modes
        sums, count = [], 0
        with torch.no_grad():
            ours.model.eval()
            for a, b in zip(rows.offsets, rows.offsets[1:], strict=False):
                width = -(-(b - a) // 8) * 8
                ids, labels = (torch.full((1, width), fill) for fill in (rows.pad_id, -100))
                ids[0, : b - a] = torch.from_numpy(rows.ids[a:b].astype(int))
                labels[0, : b - a] = torch.where(torch.tensor(rows.trains[a:b]), ids[0, : b - a], -100)
                count += int((labels[:, 1:] != -100).sum())
                sums.append(ours.loss(ids, labels, 1.0).item())
    assert found is not None
    assert found.loss == math.fsum(sums) / count
    assert (found.label_tokens, found.rows, found.tokens) == (count, len(rows), len(rows.ids))


RISING = {"batch_size": 4, "lr": 0.02, "lr_scheduler": "constant", "num_epochs": 3, "eval_samples": 4, "eval_steps": 2}


@pytest.fixture(scope="module")
def best(options, tmp_path_factory) -> Run:
    """A run whose evaluation loss falls and rises again, that leaves its best adapter."""
    folder = tmp_path_factory.mktemp("best")
    run = run_alone(options | RISING | {"save_best": True}, folder / "out")
    losses = [e["eval_loss"] for e in run.evaluations]
    assert losses[-1] > min(losses) + 0.01, losses
    return run


def test_the_adapter_with_the_lowest_loss_is_in_output_dir_and_the_last_beside_it(options, best):
    lowest = min(best.evaluations, key=lambda e: e["eval_loss"])
    assert [e["eval_is_best"] for e in best.evaluations].count(True) > 0
    assert [e for e in best.evaluations if e["eval_is_best"]][-1] == lowest
    model, rows = Path(str(options["model_name"])), Path(str(options["dataset"]))
    config = (best.folder / "config.yaml").read_text()
    assert "save_best: true" in config
    held = held_out_lines(options, rows)
    trained = {line for line in rows.read_text().splitlines(keepends=True) if line not in held}
    for folder, record in ((best.folder, lowest), (best.folder / "last", best.evaluations[-1])):
        loss, _ = peft_loss(folder, model, rows, trained)
        assert loss == pytest.approx(record["eval_loss"], rel=EXACT), folder
        assert (folder / "tokenizer.json").is_file()


def held_out_lines(options: Options, rows: Path) -> set[str]:
    from fsdp_qlora.data.held_out import hold_out

    tokenizer = AutoTokenizer.from_pretrained(options["model_name"])
    read = load_rows(DataOptions(str(rows), rows_cache=None, context_length=64), tokenizer, 264)
    _, held = hold_out(read, 4, 42)
    lines = rows.read_text().splitlines(keepends=True)
    assert len(held) == 4
    return {lines[number] for number in held.index}


def test_training_with_held_out_rows_is_training_without_these_rows(options, tmp_path, best):
    rows = Path(str(options["dataset"]))
    held = held_out_lines(options, rows)
    left = tmp_path / "left.jsonl"
    left.write_text("".join(line for line in rows.read_text().splitlines(keepends=True) if line not in held))
    more = {name: value for name, value in RISING.items() if not name.startswith("eval")}
    without = run_alone(options | more | {"dataset": left}, tmp_path / "out")
    assert without.losses == best.losses
    assert torch.equal(*(next(iter(run.tensors.values())) for run in (without, Run(best.folder / "last"))))


def test_a_run_stops_early_where_the_loss_falls_no_more(options, best, tmp_path, capsys):
    run = run_alone(options | RISING | {"early_stopping_patience": 2}, tmp_path / "out")
    out = capsys.readouterr().out
    lowest = min(range(len(best.evaluations)), key=lambda i: best.evaluations[i]["eval_loss"])
    shown = [e["eval_loss"] for e in run.evaluations]
    assert shown == [e["eval_loss"] for e in best.evaluations][: len(shown)]
    assert run.records[-1]["step"] == run.evaluations[-1]["step"] < best.records[-1]["step"]
    assert not any(e["eval_is_best"] for e in run.evaluations[-2:])
    assert f"step {run.records[-1]['step']}: stopped early, as 2 evaluations came to no lower loss than" in out
    assert f"trained {run.records[-1]['step']} of {best.records[-1]['step']} steps" in out
    assert len(run.evaluations) <= lowest + 3
    assert (run.folder / "adapter_model.safetensors").is_file()


def test_a_loss_that_is_not_finite_is_told_and_training_goes_on(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Evaluator, "__call__", lambda self, stop: Evaluated(math.nan, 5, 9, 2, 0.1))
    more = {"batch_size": 4, "max_steps": 3, "eval_samples": 2, "eval_steps": 1, "save_best": True}
    run = run_alone(options | more, tmp_path / "out")
    assert len(run.records) == 3
    assert [e["eval_loss"] for e in run.evaluations] == [None] * 3
    assert "step 1: evaluation loss nan: no improvement, and training goes on" in capsys.readouterr().out
    assert run.tensors, "the last adapter, as none is the best"
    assert not (run.folder / "last").exists()


def test_a_best_adapter_that_cannot_be_saved_does_not_end_the_run(options, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise TrainingStopped("output_dir: the adapter could not be saved in x (No space left on device)")

    monkeypatch.setattr(loop, "save_adapter", full)
    more = {"batch_size": 4, "max_steps": 2, "eval_samples": 2, "eval_steps": 1, "save_best": True}
    run = run_alone(options | more, tmp_path / "out")
    assert "No space left on device); training goes on, and this best adapter is not kept" in capsys.readouterr().out
    assert run.tensors
    assert not (run.folder / "last").exists()


def test_a_signal_ends_an_evaluation_and_the_adapter_is_saved(options, tmp_path, monkeypatch, capsys):
    evaluate = Evaluator.__call__

    def interrupted(self, stop):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, stop)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    more = {"batch_size": 4, "max_steps": 3, "eval_samples": 2, "eval_steps": 1, "output_dir": tmp_path / "out"}
    assert train.main(flags(options | more)) == 143
    run = Run(tmp_path / "out")
    assert (len(run.records), run.evaluations) == (1, [])
    assert run.tensors
    assert "trained 1 of 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["in the last step", "in its evaluation"])
def test_a_signal_before_the_last_evaluation_is_no_end_by_itself(moment, options, tmp_path, monkeypatch):
    """All steps are done, but not what the run was to tell of them: the resumed run makes up for it."""
    more = {"batch_size": 4, "max_steps": 2, "eval_samples": 2, "eval_steps": 2, "resume": "auto"}
    owner, name = {"in the last step": (Metrics, "on_step"), "in its evaluation": (Evaluator, "__call__")}[moment]
    original = getattr(owner, name)

    def interrupted(self, argument):
        if getattr(argument, "step", 2) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, argument)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        assert train.main(flags(options | more | {"output_dir": tmp_path / "out"})) == 143
    run = Run(tmp_path / "out")
    assert (len(run.records), run.evaluations) == (2, [])
    assert run.tensors
    assert "stopped by SIGTERM" in (tmp_path / "out/environment.json").read_text()
    run_alone(options | more, tmp_path / "out")
    assert [e["step"] for e in run.evaluations] == [2]


def test_a_run_that_goes_on_evaluates_as_one_that_was_never_stopped(options, tmp_path, monkeypatch):
    """The signal comes in the second evaluation, which the resumed run makes up for before its first step."""
    evaluate, calls = Evaluator.__call__, []

    def interrupted(self, stop):
        calls.append(stop)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, stop)

    more = RISING | {"eval_steps": 1, "max_steps": 4, "save_best": True, "save_steps": 4, "early_stopping_patience": 2}
    whole = run_alone(options | more, tmp_path / "whole")
    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    out = tmp_path / "out"
    assert train.main(flags(options | more | {"output_dir": out})) == 143
    stopped = Run(out)
    assert ([e["step"] for e in stopped.evaluations], len(stopped.records)) == ([1], 2)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["checkpoint-2", "last"]
    run = run_alone(options | more | {"resume": "auto"}, out)
    assert len(calls) == 2 + 3
    shown = ("step", "epoch", "eval_loss", "eval_is_best")
    assert [[e[name] for name in shown] for e in run.evaluations] == [
        [e[name] for name in shown] for e in whole.evaluations
    ]
    assert len(run.evaluations) == 4
    folders = [name for name in (".", "last") if (whole.folder / name / "adapter_model.safetensors").exists()]
    assert folders == [name for name in (".", "last") if (out / name).exists()]
    for folder in folders:
        for name, tensor in Run(whole.folder / folder).tensors.items():
            assert torch.equal(Run(out / folder).tensors[name], tensor)


def test_what_is_evaluated_is_told(best, options, tmp_path, capsys):
    run = run_alone(options | RISING | {"max_steps": 2, "log_to": "stdout"}, tmp_path / "out")
    out = capsys.readouterr().out
    assert f"eval      {options['dataset']}: 4 rows (prompt_completion)" in out
    assert "held out by content" in out
    assert "every 2 steps and at the end" in out
    assert f"step 2: evaluation loss {run.evaluations[0]['eval_loss']:.4f}, the lowest so far, perplexity" in out
    assert f"eval    loss {run.evaluations[0]['eval_loss']:.4f} at step 2" in out
    first = json.loads((best.folder / "metrics.jsonl").read_text().splitlines()[2])
    assert first["step"] == 2
    assert "loss" not in first


FEW = [
    ({"save_best": True}, "with 1 evaluation in 4 steps; set eval_steps to 3, or omit save_best"),
    ({"save_best": True, "max_steps": 1}, "save_best: has no effect with 1 evaluation in 1 step; omit save_best"),
    ({"early_stopping_patience": 1, "eval_steps": 2}, "with 2 evaluations in 4 steps; set eval_steps to 1, or omit it"),
    ({"early_stopping_patience": 2, "eval_steps": 1, "max_steps": 3}, "in 3 steps; set it to 1, or omit it"),
    ({"early_stopping_patience": 3}, "early_stopping_patience 3: has no effect with 1 evaluation in 4 steps; omit it"),
]
WELL = [
    {"save_best": True, "eval_steps": 3},
    {"early_stopping_patience": 1, "eval_steps": 1},
    {"early_stopping_patience": 1, "eval_steps": 1, "max_steps": 3},
]


@pytest.mark.parametrize(("more", "words"), FEW)
def test_options_that_so_few_evaluations_leave_without_effect_are_refused(options, tmp_path, capsys, more, words):
    out = tmp_path / "out"
    few = {"max_steps": 4, "eval_samples": 2, "output_dir": out}
    assert train.main(flags(options | few | more)) == 2
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.strip()] == [
        line for line in captured.err.splitlines() if words in line
    ]
    assert words in captured.err
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("more", WELL)
def test_what_is_advised_for_few_evaluations_is_taken(more):
    asked = {"max_steps": 4, "eval_samples": 2} | more
    evaluation = parse(["--model_name", "m", *flags(asked)]).evaluation
    check_evaluations(evaluation, steps=asked["max_steps"], steps_per_epoch=100)
