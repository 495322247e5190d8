"""What a run leaves and shows: JSON lines, progress for terminals and logs, loggers, the curve and the summary."""

import io
import json
import mmap
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsdp_qlora.config.options import Config, ModelOptions, OutputOptions, ProfileOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.report.loggers import check_installed
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.profiler import profiled
from fsdp_qlora.report.progress import as_time
from fsdp_qlora.report.step_record import StepRecord
from fsdp_qlora.runtime.host_memory import HostMemory, host_memory_gib

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
        block.write(b"x" * 2**28)
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


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
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
