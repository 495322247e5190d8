"""What a run leaves and shows: JSON lines, progress for terminals and logs, loggers, the curve and the summary."""

import io
import json
import math
import mmap
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fsdp_qlora.config.options import Config, ModelOptions, OutputOptions, ProfileOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.report import progress
from fsdp_qlora.report.loggers.base import LoggerSpec
from fsdp_qlora.report.loggers.table import LOGGERS, check_installed
from fsdp_qlora.report.loss_curve import draw_loss_curve
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.profiler import check_profile, profiled
from fsdp_qlora.report.records import EvalRecord, StepRecord
from fsdp_qlora.report.scalars import eval_scalars, step_scalars
from fsdp_qlora.report.series import running_mean
from fsdp_qlora.runtime.host_memory import HostMemory, host_memory_gib
from fsdp_qlora.units import as_time

MAIN = World(0, 2, 0, 2, torch.device("cpu"))
OTHER = World(1, 2, 1, 2, torch.device("cpu"))


def config_for(folder: Path, *log_to: str) -> Config:
    return Config(ModelOptions(model_name="tiny"), output=OutputOptions(output_dir=str(folder), log_to=list(log_to)))


def record(step: int, seconds: float = 0.5, gpu: bool = True, retries: int = 0) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=step / 10,
        loss=4.0 / step,
        lr=2e-4,
        grad_norm=1.25,
        rows=8,
        tokens=1000,
        label_tokens=600,
        seconds=seconds,
        gpu_allocated_gib=[3.0 + step, 2.0] if gpu else [],
        gpu_reserved_gib=[5.0 + step, 4.0] if gpu else [],
        gpu_retries=[2, 2 + retries * step] if gpu else [],
        host_rss_gib=[1.5, 0.5] if step == 2 else [1.0, 0.75],
    )


def test_every_step_is_a_json_line_as_soon_as_it_is_taken(tmp_path):
    with Metrics(config_for(tmp_path), MAIN, 3) as metrics:
        for step in (1, 2):
            metrics.on_step(record(step))
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
            assert len(lines) == step
    assert lines[1]["loss"] == 2.0
    assert lines[1]["tokens_per_second"] == 2000.0
    assert lines[1]["gpu_allocated_gib"] == [5.0, 2.0]
    assert set(StepRecord.__dataclass_fields__) <= set(lines[0])


def test_a_run_that_goes_on_counts_the_allocators_stops_of_its_own_process_and_changes_no_record_before(
    tmp_path, capsys
):
    with Metrics(config_for(tmp_path), MAIN, 4) as metrics:
        for step in (1, 2, 3):
            metrics.on_step(record(step, retries=5))
    before = (tmp_path / "metrics.jsonl").read_text()
    metrics = Metrics(config_for(tmp_path), MAIN, 4, (tmp_path, 2))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    metrics.take_over()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    metrics.on_step(replace(record(3), gpu_retries=[0], host_rss_gib=[1.0]))  # on one rank instead of two
    metrics.on_step(replace(record(4), gpu_retries=[3], host_rss_gib=[1.0]))
    capsys.readouterr()
    metrics.close()
    assert "the allocator stopped 3 times to give memory back after step 3" in capsys.readouterr().out


def test_the_summary_tells_steps_speed_loss_memory_and_places(tmp_path, capsys):
    metrics = Metrics(config_for(tmp_path), MAIN, 10)
    for step in range(1, 9):
        metrics.on_step(record(step, seconds=60.0 if step <= 2 else 0.5))  # a slow warm-up must not show in tok/s
    metrics.close(saved=["out/adapter_model.safetensors"], host_peak_gib=[9.0, 0.25])
    metrics.close()
    out = capsys.readouterr().out
    assert "trained 8 of 10 steps in 2:03, 8,000 tokens, median 2,000 tok/s" in out
    assert "loss    4.0000 at step 1, 0.5000 at step 8" in out
    assert "rank 0 11.00 / 13.00, rank 1 2.00 / 4.00" in out
    assert "host    peak GiB: 9.25 in all; rank 0 9.00, rank 1 0.75" in out
    assert out.count("trained") == 1
    for place in ("out/adapter_model.safetensors", tmp_path / "metrics.jsonl", tmp_path / "loss.png"):
        assert str(place) in out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_time_between_steps_counts_for_what_is_left_and_is_told(tmp_path, capsys, monkeypatch):
    """Ten steps of 2 s with an evaluation of 30 s after every second one take 170 s, and 150 more than the steps."""
    now = 1000.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    metrics = Metrics(config_for(tmp_path, "stdout"), MAIN, 10)
    for step in range(1, 11):
        now += 2.0
        metrics.on_step(record(step, seconds=2.0))
        if step % 2 == 0:
            now += 30.0
    metrics.close()
    out = capsys.readouterr().out
    left = re.findall(r"([\d:]+) left", out)
    assert left[0] == "0:18"  # nothing but steps is known
    assert left[2] == "1:59"  # 7 steps of 2 s, and as long after each as after the first two: 15 s
    assert left[8] == "0:17"
    assert "        2:30 more between steps, for checkpoints and the adapter" in out


def test_memory_that_was_too_tight_is_told(tmp_path, capsys):
    for retries in (0, 3):
        metrics = Metrics(config_for(tmp_path), MAIN, 2)
        for step in (1, 2):
            metrics.on_step(record(step, retries=retries))
        metrics.close()
        told = "the allocator stopped 3 times to give memory back after step 1" in capsys.readouterr().out
        assert told is bool(retries)


def test_what_was_recorded_survives_a_failure(tmp_path, capsys):
    def fail() -> None:
        with Metrics(config_for(tmp_path, "tqdm"), MAIN, 10) as metrics:
            metrics.on_step(record(1))
            raise KeyError("step 3")

    with pytest.raises(KeyError, match="step 3"):
        fail()
    assert "trained 1 of 10 steps" in capsys.readouterr().out
    assert (tmp_path / "loss.png").exists()


def test_only_rank_0_writes_and_prints(tmp_path, capsys):
    with Metrics(config_for(tmp_path / "out", "tqdm", "stdout", "tensorboard"), OTHER, 2) as metrics:
        metrics.on_step(record(1))
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_few_whole_lines_and_stdout_every_step(tmp_path, capsys):
    with Metrics(config_for(tmp_path, "tqdm"), MAIN, 50) as metrics:
        for step in range(1, 51):
            metrics.on_step(record(step, gpu=False))
        captured = capsys.readouterr()
    shown = captured.out.splitlines()
    assert [line.split()[1] for line in shown] == ["1/50", "50/50"]
    assert "loss 4.0000" in shown[0]
    assert "2,000 tok/s" in shown[0]
    assert "1.8 GiB host" in shown[0]
    assert "0:24 left" in shown[0]
    assert "\r" not in captured.out + captured.err
    capsys.readouterr()
    with Metrics(config_for(tmp_path, "tqdm", "stdout"), MAIN, 50) as metrics:
        for step in range(1, 6):
            metrics.on_step(record(step))
        shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown] == [f"{step}/50" for step in range(1, 6)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_loss_speed_memory_and_time_left(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    with Metrics(config_for(tmp_path, "tqdm"), MAIN, 4) as metrics:
        for step in range(1, 4):
            metrics.on_step(record(step, seconds=90.0))
            time.sleep(0.11)  # tqdm redraws ten times a second
    drawn = terminal.getvalue().split("\r")
    assert any(re.search(r"3/4 steps \|.*loss 1\.3333 .*11 tok/s  8\.0 GiB  1:30 left", frame) for frame in drawn), (
        drawn
    )
    assert "| 01:30" in drawn[-1], "the first step, after which the bar came up, counts as elapsed"


def test_gib_speed_and_link_are_numbers_for_every_logger():
    moved = replace(record(2), link_to_gpu_gib=[1.0, 3.0], link_from_gpu_gib=[0.25, 0.0])
    assert step_scalars(moved) == {
        "train/loss": 2.0, "train/lr": 2e-4, "train/grad_norm": 1.25, "train/epoch": 0.2,
        "speed/tokens_per_second": 2000.0, "speed/seconds_per_step": 0.5,
        "memory/gpu_allocated_gib": 5.0, "memory/gpu_reserved_gib": 7.0, "memory/host_gib": 2.0,
        "link/to_gpu_gib_per_second": 6.0, "link/from_gpu_gib_per_second": 0.5,
    }  # fmt: skip
    assert not [name for name in step_scalars(record(1, gpu=False)) if name.startswith(("link/", "memory/gpu"))]
    evaluation = EvalRecord(2, 0.5, 800.0, 600, 1000, 8, 0.5, is_best=True)
    assert eval_scalars(evaluation) == {
        "eval/loss": 800.0, "eval/perplexity": math.inf, "eval/epoch": 0.5, "eval/seconds": 0.5,
        "eval/tokens_per_second": 2000.0,
    }  # fmt: skip


@pytest.mark.parametrize(("steps", "said"), [(1, "with"), (3, "with"), (4, "after")])
def test_a_run_of_few_steps_says_that_its_speed_has_the_warm_up_in_it(steps, said, tmp_path, capsys):
    with Metrics(config_for(tmp_path), MAIN, steps) as metrics:
        for step in range(1, steps + 1):
            metrics.on_step(record(step))
    assert f"median 2,000 tok/s {said} warm-up" in capsys.readouterr().out


def test_a_step_without_a_loss_is_told_to_loggers_which_hear_that_the_run_failed(tmp_path, monkeypatch):
    told, ended = list[tuple[int, float]](), list[bool]()

    class Noting:
        place = "nowhere"

        def log(self, step: int, values: Mapping[str, float]) -> None:
            told.append((step, values["train/loss"]))

        def close(self, failed: bool) -> None:
            ended.append(failed)

    monkeypatch.setitem(LOGGERS, "wandb", LoggerSpec(lambda config: Noting()))

    def fail() -> None:
        with Metrics(config_for(tmp_path, "wandb"), MAIN, 3) as metrics:
            metrics.on_step(record(1))
            metrics.on_failed_step(replace(record(2), loss=math.nan))
            raise KeyError("step 2")

    with pytest.raises(KeyError):
        fail()
    assert told[0] == (1, 4.0)
    assert told[1][0] == 2
    assert math.isnan(told[1][1])
    assert ended == [True]


def test_the_curve_has_a_mean_a_band_of_long_runs_evaluations_rates_and_failures(tmp_path, monkeypatch):
    """What is drawn, by the artists of the figure."""
    drawn = list[Figure]()
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    steps = [replace(record(step), loss=1.0 + step % 2, lr=step * 1e-6) for step in range(1, 5001)]
    steps[6] = replace(steps[6], loss=9.0)
    evaluations = [EvalRecord(step, 0.5, 1.25, 600, 1000, 8, 0.5, is_best=False) for step in (0, 2500, 5000)]
    failed = replace(record(5001), loss=math.nan)
    draw_loss_curve(tmp_path / "loss.png", "tiny", steps, evaluations, failed)
    draw_loss_curve(tmp_path / "loss.png", "tiny", steps[:12])
    losses, rates = drawn[0].axes
    lines = {line.get_label(): line for line in [*losses.lines, *rates.lines]}
    assert set(lines) == {"mean of 250 steps", "evaluation", "learning rate", "step 5001: the loss is nan"}
    assert lines["mean of 250 steps"].get_ydata()[-1] == pytest.approx(1.5)
    assert list(lines["evaluation"].get_xdata()) == [0, 2500, 5000]
    assert set(lines["step 5001: the loss is nan"].get_xdata()) == {5001}
    assert max(lines["learning rate"].get_ydata()) <= 5e-3
    (whole,) = losses.collections
    heights = whole.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 9.0), "no spike is lost"
    assert len(heights) < 5000
    (axes, _) = drawn[1].axes
    assert [line.get_label() for line in axes.lines] == ["step"]
    assert list(axes.lines[0].get_ydata()) == [record.loss for record in steps[:12]]


def test_means_leave_out_what_is_not_finite():
    losses = np.array([1.0, math.nan, 3.0, 5.0, math.inf, math.nan, math.nan])
    assert running_mean(losses, 2).tolist() == pytest.approx([1, 1, 3, 4, 5, math.nan, math.nan], nan_ok=True)


def test_an_evaluation_is_in_the_record_the_bar_the_curve_and_the_loggers(tmp_path, monkeypatch, capsys):
    terminal, told, drawn = Terminal(), list[tuple[int, dict[str, float]]](), list[Figure]()

    class Noting:
        place = "nowhere"

        def log(self, step: int, values: Mapping[str, float]) -> None:
            told.append((step, dict(values)))

        def close(self, failed: bool) -> None:
            pass

    monkeypatch.setitem(LOGGERS, "wandb", LoggerSpec(lambda config: Noting()))
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    evaluations = [
        EvalRecord(1, 0.1, 1.25, 600, 1000, 8, 0.5, True),
        EvalRecord(2, 0.2, math.nan, 600, 1000, 8, 0.5, False),
    ]
    with Metrics(config_for(tmp_path, "tqdm", "wandb"), MAIN, 3) as metrics:
        for step in (1, 2, 3):
            metrics.on_step(record(step))
            if step < 3:
                metrics.on_eval(evaluations[step - 1])
            time.sleep(0.11)
        metrics.on_eval(replace(evaluations[0], step=3, loss=1.5, is_best=False))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["loss" in line for line in lines] == [True, False, True, False, True, False]
    assert lines[1] == {
        "step": 1, "epoch": 0.1, "eval_loss": 1.25, "eval_label_tokens": 600, "eval_tokens": 1000, "eval_rows": 8,
        "eval_seconds": 0.5, "eval_is_best": True, "eval_perplexity": math.exp(1.25),
    }  # fmt: skip
    assert (lines[3]["eval_loss"], lines[3]["eval_perplexity"]) == (None, None)
    evaluated = [
        (step, values["eval/loss"], values["eval/perplexity"]) for step, values in told if "eval/loss" in values
    ]
    assert evaluated[0] == (1, 1.25, math.exp(1.25))
    assert [step for step, *_ in evaluated] == [1, 2, 3]
    assert "left  eval 1.2500" in terminal.getvalue()
    (curve,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "evaluation"]
    assert list(curve.get_xydata().ravel()) == [1, 1.25, 3, 1.5]
    out = capsys.readouterr().out
    assert "step 1: evaluation loss 1.2500, the lowest so far, perplexity 3.49; 8 rows in 0:00" in out
    assert "step 2: evaluation loss nan: no improvement, and training goes on" in out
    assert "eval    loss 1.5000 at step 3, perplexity 4.482; lowest 1.2500 at step 1" in out


def test_no_step_at_all_is_said(tmp_path, capsys):
    Metrics(config_for(tmp_path, "tqdm"), MAIN, 4).close()
    assert "no step was completed" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


def test_an_unwritable_output_dir_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"output_dir: .*file.* cannot be written"):
        Metrics(config_for(tmp_path / "file"), MAIN, 4)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_a_users_mistake_on_every_rank(tmp_path, monkeypatch, name):
    leftover = tmp_path / name / "run-1"  # wandb leaves such a folder behind, which Python could import as a package
    leftover.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)  # where an earlier test has imported it
    for world in (MAIN, OTHER):
        with pytest.raises(UserError, match=rf"{name} was asked for but is not installed: run `pip install {name}`"):
            Metrics(config_for(tmp_path / "out", name), world, 4)
    check_installed(config_for(tmp_path, "tqdm", "stdout"))


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(config_for(tmp_path, "tensorboard"), MAIN, 2) as metrics:
        for step in (1, 2):
            metrics.on_step(record(step))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 4.0), (2, 2.0)]
    assert [event.value for event in events.Scalars("memory/gpu_allocated_gib")] == [4.0, 5.0]


def test_times_read_as_people_write_them():
    assert [as_time(seconds) for seconds in (0, 7.4, 61, 3725)] == ["0:00", "0:07", "1:01", "1:02:05"]


def test_a_page_shared_by_two_processes_counts_once_between_them():
    before = host_memory_gib()
    block = mmap.mmap(-1, 2**28)  # 0.25 GiB that a forked process shares
    with HostMemory(interval=0.01) as memory:
        for _ in range(2**8):  # a piece of 0.25 GiB would count beside it where malloc keeps what is freed
            block.write(b"x" * 2**20)
        alone = memory.read() - before
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # no torch in here: its threads did not survive the fork
        block[:: mmap.PAGESIZE]  # touches every page
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    shared = host_memory_gib() - before
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    assert memory.peak >= before + alone
    assert alone == pytest.approx(0.25, abs=0.05)
    assert shared < alone - 0.1


@pytest.mark.filterwarnings("error")
def test_profiling_writes_what_was_asked_for_and_nothing_otherwise(tmp_path):
    # As a run has it: on the GPU where there is one, for PyTorch asks that for its memory whatever device it is told.
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    world = replace(MAIN, device=device)

    def run(options: ProfileOptions, steps: int) -> list[str]:
        with profiled(options, world, steps) as profiler:
            for _ in range(steps):
                torch.mm(torch.ones(64, 64, device=device), torch.ones(64, 64, device=device))
                profiler.on_step(record(1))
        folder = Path(options.profiling_output)
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    assert run(ProfileOptions(profiling_output=str(tmp_path / "off")), 3) == []
    for steps in (1, 2, 4, 8):
        options = ProfileOptions(True, str(tmp_path / str(steps)), with_shapes=True, export_trace=True)
        assert run(options, steps) == ["table.txt", "trace_rank0.json.gz"]
        table = (tmp_path / str(steps) / "table.txt").read_text()
        calls = next(line for line in table.splitlines() if "aten::mm" in line)
        assert "[[64, 64], [64, 64]]" in calls
        assert f" {min(3, steps)} " in calls
    options = ProfileOptions(True, str(tmp_path / "timeline"), export_memory_timeline=True)
    assert run(options, 3) == ["memory_rank0.html", "table.txt"]


def test_a_profile_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path, capsys):
    options = ProfileOptions(True, str(tmp_path / "profiles"), export_trace=True)
    (tmp_path / "profiles" / "table.txt").mkdir(parents=True)
    with profiled(options, MAIN, 1) as profiler:
        profiler.on_step(record(1))
    assert capsys.readouterr().out.splitlines() == [
        f"rank 0: no profile could be written in {tmp_path}/profiles (Is a directory); training goes on without it"
    ]


@pytest.mark.parametrize("blocked", ["profiles", "profiles/table.txt"])
def test_a_profile_that_has_nowhere_to_go_is_a_mistake_before_anything_is_loaded(tmp_path, blocked):
    path = tmp_path / blocked
    path.parent.mkdir(exist_ok=True)
    path.write_text("") if blocked == "profiles" else path.mkdir()
    options = ProfileOptions(True, str(tmp_path / "profiles"))
    with pytest.raises(UserError, match=r"^profiling_output: .* cannot be written .*; choose another folder$"):
        check_profile(options)
    check_profile(replace(options, profile=False))
