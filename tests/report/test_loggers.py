"""Loggers: those that options can name, what each is told, and runs whose logger cannot start or fails half way."""

import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig

import train
from fsdp_qlora.config.log_targets import LOG_TARGETS, readers
from fsdp_qlora.config.options import OPTIONS
from fsdp_qlora.config.parse import parse
from fsdp_qlora.errors import UserError
from fsdp_qlora.report.loggers.behind import Behind
from fsdp_qlora.report.loggers.table import LOGGERS
from tests.support import tiny
from tests.support.fake_trackers import ENDS, SOURCES, FakeTrackers
from tests.support.runs import Options, Run, flags

STEPS = 3


def test_log_to_names_every_logger_of_the_table():
    assert set(OPTIONS["log_to"].choices) == {"tqdm", "stdout", *LOGGERS}


@pytest.mark.parametrize("option", ["project_name", "name", "group", "entity"])
def test_an_option_that_no_chosen_logger_reads_is_refused(option):
    assert readers(option)
    for target in LOG_TARGETS:
        given = ["--model_name", "m", "--log_to", target, f"--{option}", "x"]
        if target in readers(option):
            parse(given)
        else:
            with pytest.raises(UserError, match=f"{option} x: has no effect.*add {' or '.join(readers(option))} to"):
                parse(given)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("run")
    return {
        "model_name": tiny.save_model(LlamaConfig(**tiny.SHAPE | {"num_hidden_layers": 1}), folder / "model"),
        "dataset": tiny.save_rows(folder / "rows.jsonl", 6),
        "rows_cache": "null", "context_length": 56, "batch_size": 2, "lora_rank": 2, "max_steps": STEPS,
        "fused": "false", "precision": "fp32",
    }  # fmt: skip


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrackers]:
    """The stand-ins, importable in place of what may be installed."""
    fakes = FakeTrackers(tmp_path / "fakes")
    monkeypatch.syspath_prepend(fakes.folder)
    for name, value in fakes.environ.items():
        monkeypatch.setenv(name, value)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    mine = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in SOURCES}
    yield fakes
    for name in [*sys.modules]:
        if name.split(".")[0] in SOURCES:
            del sys.modules[name]
    sys.modules.update(mine)


@pytest.mark.slow
def test_every_logger_gets_config_names_steps_and_a_good_end(options, fakes, tmp_path):
    named: Options = {"project_name": "whales", "name": "blue", "group": "baleen", "entity": "ocean"}
    for logger in SOURCES:
        fakes.calls_file.unlink(missing_ok=True)
        mine = {option: value for option, value in named.items() if logger in readers(option)}
        folder = tmp_path / logger
        assert train.main(flags(options | mine | {"log_to": logger, "output_dir": folder})) == 0
        (started,) = fakes.calls("init")
        told = {option.removesuffix("_name"): value for option, value in mine.items()}
        assert {option: value for option, value in started.items() if option != "config"} == told
        config = started["config"] or fakes.calls("config")[0]["config"]
        assert str(config["max_steps"]) == str(STEPS)
        assert set(config) == set(parse(["--model_name", "m"]).to_flat())
        steps = fakes.calls("log")
        records = Run(folder).records
        assert [call["step"] for call in steps] == [record["step"] for record in records] == [1, 2, 3]
        for call, record in zip(steps, records, strict=True):
            assert call["values"]["train/loss"] == record["loss"]
            assert call["values"]["train/lr"] == record["lr"]
            assert call["values"]["speed/tokens_per_second"] == pytest.approx(record["tokens_per_second"], rel=1e-3)
            assert call["values"]["memory/host_gib"] == pytest.approx(sum(record["host_rss_gib"]), abs=2e-3)
        assert fakes.calls("finish") == [ENDS[logger][0]]


@pytest.mark.slow
def test_a_logger_that_cannot_start_ends_the_run_before_anything_is_loaded(
    options, fakes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FAKE_TRACKER_FAILS", "init")
    code = train.main(flags(options | {"log_to": "mlflow,tensorboard", "output_dir": tmp_path / "out"}))
    said = capsys.readouterr().err
    assert code == 2
    assert "log_to: mlflow could not start (no init today): check MLFLOW_TRACKING_URI, or leave mlflow out" in said
    assert "and more of it" not in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "config.yaml").exists(), "written just before loading"


@pytest.mark.slow
def test_a_logger_that_fails_half_way_is_told_once_and_training_goes_on(options, fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_TRACKER_FAILS", "log")
    assert train.main(flags(options | {"log_to": "wandb", "output_dir": tmp_path / "out"})) == 0
    said = capsys.readouterr().out
    assert said.count("log_to: wandb did not take step 1 (no log today): training goes on") == 1
    assert said.count("did not take") == 2
    assert f"log_to: wandb lacks {STEPS} of {STEPS} records, which it did not take" in said
    assert len(Run(tmp_path / "out").records) == STEPS
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert fakes.calls("finish") == [{"exit_code": 0}], "a network may come back, so it is ended as any other"


class Slow:
    place = "nowhere"

    def __init__(self) -> None:
        self.may_go, self.steps, self.ended = threading.Event(), list[int](), list[bool]()

    def log(self, step: int, values: object) -> None:
        self.may_go.wait()
        self.steps.append(step)

    def close(self, failed: bool) -> None:
        self.ended.append(failed)


def test_no_step_waits_for_a_slow_logger_and_the_end_does():
    slow, said = Slow(), list[str]()
    behind = Behind("slow", slow, said.append)
    for step in (1, 2, 3):
        behind.log(step, {"train/loss": math.nan})
    assert slow.steps == []
    slow.may_go.set()
    behind.close(failed=True)
    assert slow.steps == [1, 2, 3]
    assert slow.ended == [True]
    assert said == []


def test_a_logger_that_hangs_at_the_end_is_left_and_told():
    slow, said = Slow(), list[str]()
    behind = Behind("slow", slow, said.append)
    behind.log(1, {})
    behind.close(failed=False, patience_seconds=0.01)
    assert said == ["log_to: slow did not take the last numbers within 0.01 s: it is left as it is"]
    assert slow.ended == []
    slow.may_go.set()
