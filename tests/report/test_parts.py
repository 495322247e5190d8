"""What a run notes of where it ran and how it ended, and the page that it writes at its end."""

import errno
import json
import os
import platform
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import train
from fsdp_qlora import run as run_module
from fsdp_qlora.config.options import Config, ModelOptions, OutputOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import TrainingStopped
from fsdp_qlora.report import machine
from fsdp_qlora.report import metrics as metrics_module
from fsdp_qlora.report.machine import machine_lines
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.parts import begin_part, end_part, parts_in
from fsdp_qlora.report.records import StepRecord
from tests.support import tiny
from tests.support.run_folders import part
from tests.support.runs import Options, flags, run_alone
from tests.support.torchrun import ROOT

TWO = World(0, 2, 0, 2, torch.device("cpu"))


def config_for(folder: Path) -> Config:
    return Config(ModelOptions(model_name="tiny"), output=OutputOptions(output_dir=str(folder)))


def metrics_of(folder: Path) -> Metrics:
    return Metrics(config_for(folder), TWO, 3)


def record(step: int) -> StepRecord:
    return StepRecord(step, step / 3, 1.0, 1e-4, 1.0, 2, 100, 50, 0.5, [], [], [], [1.0, 1.0])


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("parts")
    model = tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), folder / "base")
    return {
        "model_name": model, "dataset": tiny.save_rows(folder / "rows.jsonl", 12), "precision": "fp32",
        "context_length": 64, "batch_size": 2, "lora_rank": 4, "max_steps": 4, "log_to": "stdout", "report": "true",
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_and_its_continuation_note_where_they_ran(options, tmp_path):
    run = run_alone(options | {"save_steps": 2}, tmp_path / "out")
    (noted,) = parts_in(run.folder)
    assert (noted["from_step"], noted["steps"], noted["ranks"]) == (0, 4, 1)
    assert (noted["ended"]["step"], noted["ended"]["how"]) == (4, "finished")
    assert noted["versions"]["torch"] == torch.__version__
    assert noted["versions"]["python"] == platform.python_version()
    assert noted["hosts"][0]["memory_bytes"] > 2**28
    assert platform.node() not in json.dumps(noted), "a report is passed on"
    assert len(noted["gpus"]) == (1 if torch.cuda.is_available() else 0)
    on = {"save_steps": 2, "resume": run.folder / "checkpoint-2"}
    other = run_alone(options | on, tmp_path / "other")
    again = run_alone(options | on | {"overwrite_output_dir": "true"}, run.folder)
    for folder in (other.folder, again.folder):
        first, second = parts_in(folder)
        assert first == noted
        assert (second["from_step"], second["ended"]["how"]) == (2, "finished")
        assert "from step 3" in (folder / "report.html").read_text()
    run_alone(options | {"overwrite_output_dir": "true", "report": "false"}, run.folder)
    assert [one["from_step"] for one in parts_in(run.folder)] == [0]


def test_a_signal_and_a_loss_that_is_no_number_are_noted_and_on_the_page(options, tmp_path, monkeypatch):
    took = Metrics.on_step

    def interrupted(self: Metrics, record: StepRecord) -> None:
        took(self, record)
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "on_step", interrupted)
    assert train.main(flags(options | {"output_dir": tmp_path / "ended"})) == 143
    monkeypatch.undo()
    (noted,) = parts_in(tmp_path / "ended")
    assert (noted["ended"]["step"], noted["ended"]["how"]) == (2, "stopped by SIGTERM")
    assert "2 of 4 steps, stopped by SIGTERM" in (tmp_path / "ended" / "report.html").read_text()
    wild = options | {"lr": "1e30", "lr_scheduler": "constant", "apply_gradient_clipping": "false"}
    assert train.main(flags(wild | {"output_dir": tmp_path / "nan"})) == 1
    page = (tmp_path / "nan" / "report.html").read_text()
    assert "ended the run: the " in page
    assert " is nan" in parts_in(tmp_path / "nan")[0]["ended"]["how"]


def test_a_full_disk_costs_the_page_and_not_the_run(options, tmp_path, monkeypatch, capsys):
    touch = Path.touch

    def full(self: Path, *arguments: object, **more: object) -> None:
        if self.name.startswith((".report.html", ".environment.json")) and (tmp_path / "out" / "loss.png").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        touch(self, *arguments, **more)

    monkeypatch.setattr(Path, "touch", full)
    run = run_alone(options, tmp_path / "out")
    said = capsys.readouterr().out
    assert "report.html could not be written: No space left on device" in said
    assert "environment.json could not be written: No space left on device" in said
    assert len(run.losses) == 4
    assert run.tensors
    assert not (run.folder / "report.html").exists()


def test_whatever_is_wrong_with_the_page_the_run_ends_as_it_would_without(options, tmp_path, monkeypatch, capsys):
    def surprised(folder: Path) -> Path:
        raise KeyError("surprise")

    monkeypatch.setattr(metrics_module, "write_report", surprised)
    assert run_alone(options, tmp_path / "out").tensors
    assert "report.html could not be written: KeyError: 'surprise'" in capsys.readouterr().out
    wild = options | {"lr": "1e30", "lr_scheduler": "constant", "apply_gradient_clipping": "false"}
    assert train.main(flags(wild | {"output_dir": tmp_path / "nan"})) == 1
    said = capsys.readouterr()
    assert " is nan" in said.err, "the run's own error"
    assert "surprise" not in said.err


def test_a_run_that_ends_before_its_first_step_says_how(options, tmp_path, monkeypatch):
    whole = run_alone(options | {"save_steps": 2}, tmp_path / "whole")
    before = {file.name: file.read_bytes() for file in whole.folder.iterdir() if file.is_file()}

    def ends(error: BaseException) -> None:
        def load(*_: object) -> None:
            raise error

        monkeypatch.setattr(run_module, "load", load)

    out = tmp_path / "out"
    new = options | {"output_dir": out, "overwrite_output_dir": "true"}
    for error, code, how in (
        (TrainingStopped("a disk is gone"), 1, "a disk is gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        ends(error)
        assert train.main(flags(new)) == code
        assert parts_in(out)[0]["ended"]["how"] == how
        assert f"0 of 4 steps, {how}" in (out / "report.html").read_text()
    resumed = options | {"output_dir": whole.folder, "resume": "auto", "max_steps": 6}
    assert train.main(flags(resumed)) == 130
    assert {file.name: file.read_bytes() for file in whole.folder.iterdir() if file.is_file()} == before


def test_a_new_run_leaves_no_page_of_an_earlier_one(options, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("of an earlier run")
    run_alone(options | {"report": "false", "overwrite_output_dir": "true"}, out)
    assert not (out / "report.html").exists()


def test_a_page_that_takes_long_is_not_written_where_a_run_is_ended(tmp_path, monkeypatch, capsys):
    """Torchrun kills ranks 30 s after it has told them to end; the command writes the page then."""
    monkeypatch.setattr(metrics_module, "MOST_STEPS_IN_A_HURRY", 2)
    for name, how, steps in (
        ("finished", "", 3),
        ("ended", "stopped by SIGTERM", 3),
        ("short", "stopped by SIGTERM", 2),
    ):
        metrics = metrics_of(tmp_path / name)
        for number in range(1, steps + 1):
            metrics.on_step(record(number))
        metrics.close(how=how)
        said = capsys.readouterr().out
        assert (tmp_path / name / "report.html").exists() is (name != "ended")
        assert (f"python -m fsdp_qlora report --output_dir {tmp_path / name}" in said) is (name == "ended")
        assert parts_in(tmp_path / name)[0]["ended"]["step"] == steps


def test_a_run_that_another_rank_ends_says_so_and_no_address(tmp_path):
    with pytest.raises(RuntimeError), metrics_of(tmp_path):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [10.1.2.3]:4567")
    assert parts_in(tmp_path)[0]["ended"]["how"] == "another rank had ended"


def test_a_run_that_has_nothing_left_to_do_is_finished_without_a_record_of_its_steps(tmp_path):
    metrics = Metrics(config_for(tmp_path), TWO, 4, (tmp_path, 4))
    metrics.take_over()
    metrics.close()
    assert (parts_in(tmp_path)[0]["ended"]["step"], parts_in(tmp_path)[0]["ended"]["how"]) == (4, "finished")


def test_parts_up_to_a_checkpoint_are_kept_and_damaged_ones_are_none(tmp_path):
    before, now = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    now.mkdir()
    for at in (0, 5, 8):
        begin_part(before, {"ranks": at}, 20, (before, at) if at else None)
    assert [one["from_step"] for one in parts_in(before)] == [0, 5, 8]
    begin_part(now, {"ranks": 2}, 20, (before, 8))
    assert [one["from_step"] for one in parts_in(now)] == [0, 5, 8]
    assert "ended" not in parts_in(now)[-1]
    end_part(now, 12, "finished")
    assert parts_in(now)[-1]["ended"]["step"] == 12
    for text in ("{", "[]", '{"parts": 3}', '{"parts": [1]}', '{"parts": [{"from_step": 0}, {}]}', "[" * 100_000):
        (before / "environment.json").write_text(text)
        assert parts_in(before) == []
        begin_part(now, {}, 20, (before, 8))
        assert [one["from_step"] for one in parts_in(now)] == [8]
        end_part(before, 3, "finished")


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x)", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95  Release Build\nGCC 12.3.0", "580.95"),
        ("", None),
        (None, None),
    ],
)
def test_the_drivers_version_is_read_where_there_is_one(said, version, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    if said is not None:
        (tmp_path / "version").write_text(said)
    assert machine._driver() == version


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_commit_is_this_checkouts_and_changes_are_told(tmp_path, monkeypatch):
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = machine._commit()
    assert found is not None
    assert head.stdout.startswith(found.removesuffix("+changes"))
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine._commit() is None, "of a package that is installed in another's checkout nothing is told"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("a")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = machine._commit()
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "file").write_text("b")
    assert machine._commit() == f"{clean}+changes"
    monkeypatch.setenv("PATH", "")
    assert machine._commit() is None


def test_verbose_lines_count_equal_cards_and_hosts():
    two = part(0) | {"versions": {"python": "3.12.3", "torch": "2.13.0", "cuda": "13.0", "hqq": "0.2.8"}}
    assert machine_lines(two) == [
        "machine   2 x NVIDIA GeForce RTX 4090 (23.6 GiB); 32 cores, 128 GiB of host memory",
        "          Python 3.12.3, torch 2.13.0, hqq 0.2.8, CUDA 13.0",
    ]
    assert machine_lines(two | {"gpus": []})[0].startswith("machine   no GPU; ")
