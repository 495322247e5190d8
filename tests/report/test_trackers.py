"""The trackers themselves, each where it is installed: a run logs to it offline, and what it has is read back."""

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fsdp_qlora.config.log_targets import readers
from fsdp_qlora.config.options import Config, ModelOptions, OutputOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.report.loggers.table import open_loggers
from fsdp_qlora.report.records import EvalRecord
from fsdp_qlora.report.scalars import eval_scalars
from tests.support.torchrun import ROOT

# Runs in a process of its own: these packages read their folders when they are imported, and leave threads behind.
WORKER = """
import json, math, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.report.test_trackers import log_a_run
log_a_run(*json.loads(sys.argv[1]))
"""
NAMES = {"project_name": "whales", "name": "blue", "group": "baleen"}
MAIN = World(0, 1, 0, 1, torch.device("cpu"))


def config_for(logger: str, folder: Path) -> Config:
    names = {name: value for name, value in NAMES.items() if logger in readers(name)}
    return Config(ModelOptions(model_name="tiny"), output=OutputOptions(str(folder), log_to=[logger], **names))


def log_a_run(logger: str, folder: str) -> None:
    """Log two steps, an evaluation and a step without a loss."""
    (opened,) = open_loggers(config_for(logger, Path(folder)), print)
    opened.log(1, {"train/loss": 4.0, "memory/host_gib": 1.5, "speed/tokens_per_second": 2000.0})
    opened.log(2, {"train/loss": 2.0, "memory/host_gib": 1.5, "speed/tokens_per_second": 2000.0})
    opened.log(2, eval_scalars(EvalRecord(2, 0.5, 800.0, 600, 1000, 8, 0.5, True)))  # a perplexity beyond floats
    opened.log(3, {"train/loss": math.nan, "memory/host_gib": 1.5, "speed/tokens_per_second": 2000.0})
    opened.close(failed=True)
    print(f"place {opened.place}")


@dataclass
class Found:
    """What a tracker has of the run."""

    series: dict[str, list[tuple[int, float]]]  # name -> (step, value)
    config: dict[str, object]
    names: dict[str, object] = field(default_factory=dict)


def in_tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "out" / "tensorboard"))
    events.Reload()
    names = [*events.Tags()["scalars"]]
    series = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return Found(series, {row[0]: row[1] for row in rows})


def in_trackio(folder: Path) -> Found:
    from trackio.sqlite_storage import SQLiteStorage

    series: dict[str, list[tuple[int, float]]] = {}
    for line in SQLiteStorage.get_logs("whales", "blue"):
        for name, value in line.items():
            if name not in ("step", "timestamp"):
                series.setdefault(name, []).append((line["step"], math.inf if value == "Infinity" else value))
    config = SQLiteStorage.get_run_config("whales", "blue")
    return Found(series, config, {"project_name": "whales", "name": "blue", "group": config["_Group"]})


def in_mlflow(folder: Path) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("whales")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    series = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    names = {"project_name": experiment.name, "name": run.info.run_name, "group": run.data.tags["group"]}
    return Found(series, run.data.params, names)


def in_swanlab(folder: Path) -> Found:
    import yaml

    (run,) = (folder / "out" / "swanlog").glob("run-*")
    config = yaml.safe_load((run / "files" / "config.yaml").read_text())
    series = {}
    for number, name in enumerate(["train/loss", "memory/host_gib", "speed/tokens_per_second"], start=1):
        lines = [json.loads(line) for line in (run / "logs" / str(number) / "1000.log").read_text().splitlines()]
        series[name] = [(line["index"], line["data"]) for line in lines]
    return Found(series, {name: entry["value"] for name, entry in config.items()})


def in_wandb(folder: Path) -> Found:
    from wandb.proto import wandb_internal_pb2

    (file,) = (folder / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    found = Found({}, {})
    for raw in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.names = {"project_name": record.run.project, "name": record.run.display_name,
                           "group": record.run.run_group}  # fmt: skip
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if kind == "exit":
            assert record.exit.exit_code == 1
        if kind == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = record.history.step.num
            for name, value in items.items():
                if not name.startswith("_"):
                    found.series.setdefault(name, []).append((step, float(value)))
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after wandb's own 7 bytes."""
    block, place, parts = 32768, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


TRACKERS: dict[str, Callable[[Path], Found]] = {
    "tensorboard": in_tensorboard,
    "trackio": in_trackio,
    "mlflow": in_mlflow,
    "swanlab": in_swanlab,
    "wandb": in_wandb,
}
INSTALLED = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account and no network: each has a mode of its own for that."""
    settings = {
        "HOME": tmp_path / "home", "TRACKIO_DIR": tmp_path / "trackio", "SWANLAB_MODE": "local",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def in_a_process(logger: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WORKER.format(root=str(ROOT)), json.dumps([logger, str(folder / "out")])]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("logger", INSTALLED)
def test_a_tracker_has_steps_evaluation_config_and_names(logger, tmp_path, offline):
    (tmp_path / "out").mkdir()
    done = in_a_process(logger, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "did not" not in done.stdout, done.stdout
    assert "place " in done.stdout
    found = TRACKERS[logger](tmp_path)
    assert found.series["train/loss"][:2] == [(1, 4.0), (2, 2.0)]
    ((step, value),) = found.series["train/loss"][2:]
    assert (step, math.isnan(value)) == (3, True), "a NaN shows"
    assert [value for _, value in found.series["memory/host_gib"]] == [1.5] * 3
    assert [value for _, value in found.series["speed/tokens_per_second"]] == [2000.0] * 3
    if logger != "swanlab":  # whose local files tell series by number
        assert found.series["eval/loss"] == [(2, 800.0)]
        assert found.series["eval/tokens_per_second"] == [(2, 2000.0)]
        assert found.series["eval/perplexity"][0][1] > 1e300
        assert found.names == {name: value for name, value in NAMES.items() if logger in readers(name)}
    config = config_for(logger, tmp_path / "out").to_flat()
    assert set(config) <= set(found.config)
    assert str(found.config["model_name"]) == "tiny"
    assert str(found.config["lora_rank"]) == str(config["lora_rank"])


@pytest.mark.slow
@pytest.mark.parametrize("logger", INSTALLED)
def test_a_tracker_that_cannot_start_is_one_line(logger, tmp_path, offline, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").write_text("in the way")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("SWANLAB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file" / "trackio"))
    done = in_a_process(logger, tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"UserError: log_to: {logger} could not start (" in last
    assert last.endswith(f"or leave {logger} out of log_to")
