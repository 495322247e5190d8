"""Stand-ins for trackers that are not installed: packages with the same calls, which write down what they are told.

Their calls are those of trackio 0.43, mlflow 3.17, swanlab 0.10 and wandb 0.31; tests/report/test_trackers.py runs with
the packages themselves, where they are installed."""

import json
from pathlib import Path
from typing import Any

COMMON = """
import json, math, os

def tell(call, **given):
    with open(os.environ["FAKE_TRACKER_CALLS"], "a") as file:
        file.write(json.dumps([call, given]) + "\\n")
    if os.environ.get("FAKE_TRACKER_FAILS") == call:
        raise RuntimeError(f"no {call} today\\nand more of it")
"""
RUN = """
class Run:
    url, mode, dir = None, "offline", "somewhere"
    def log(self, values, step=None):
        tell("log", values=values, step=step)
    def finish(self, **given):
        tell("finish", **given)
"""
SOURCES = {
    "trackio": {
        "__init__.py": f'''{COMMON}{RUN}
def init(project, name=None, group=None, config=None, embed=True):
    tell("init", project=project, name=name, group=group, config=config)
    return Run()
''',
        "utils.py": 'import os\nTRACKIO_DIR = os.environ["TRACKIO_DIR"]\n',
    },
    "swanlab": {
        "__init__.py": f'''{COMMON}{RUN}
def init(*, project=None, name=None, group=None, workspace=None, config=None, log_dir=None):
    tell("init", project=project, name=name, group=group, entity=workspace, config=config)
    return Run()
''',
    },
    "wandb": {
        "__init__.py": f'''{COMMON}{RUN}
def init(project=None, name=None, group=None, entity=None, config=None, dir=None):
    tell("init", project=project, name=name, group=group, entity=entity, config=config)
    return Run()
''',
    },
    "mlflow": {
        "__init__.py": f'''{COMMON}
from . import entities
class _Run:
    class info:
        run_id, run_name = "1", "made-up"
class _Experiment:
    experiment_id = "7"
made = {{}}
def get_tracking_uri():
    return "sqlite:///mlflow.db"
class MlflowClient:
    def get_experiment_by_name(self, name):
        return made.get(name)
    def create_experiment(self, name):
        made[name] = _Experiment()
        if len(name) > 20:
            raise RuntimeError("another run has just made it")
        return "7"
    def create_run(self, experiment_id, tags=None, run_name=None):
        (project,) = made
        assert experiment_id == "7" and tags["resolved"] == "yes"
        tell("init", project=project, name=run_name, group=tags.get("group"), config={{}})
        return _Run()
    def log_batch(self, run_id, metrics=(), params=()):
        assert run_id == "1" and len(params) <= 100
        if params:
            tell("config", config={{p.key: p.value for p in params}})
        else:
            tell("log", values={{m.key: m.value for m in metrics}}, step=metrics[0].step)
    def set_terminated(self, run_id, status=None):
        assert run_id == "1"
        tell("finish", status=status)
''',
        "tracking/__init__.py": "",
        "tracking/context/__init__.py": "",
        "tracking/context/registry.py": 'def resolve_tags(tags):\n    return tags | {"resolved": "yes"}\n',
        "entities.py": '''
class Param:
    def __init__(self, key, value):
        assert isinstance(value, str)
        self.key, self.value = key, value
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.timestamp, self.step = key, value, timestamp, step
''',
    },
}  # fmt: skip
# How each is told of a run that ended well, and of one that did not.
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trackio": ({}, {}),
    "swanlab": ({}, {"state": "crashed", "error": "training stopped"}),
    "wandb": ({"exit_code": 0}, {"exit_code": 1}),
    "mlflow": ({"status": "FINISHED"}, {"status": "FAILED"}),
}


class FakeTrackers:
    """The stand-ins in a folder to be put on sys.path, and their calls so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls.jsonl"
        for package, files in SOURCES.items():
            for file, text in files.items():
                (folder / package / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / package / file).write_text(text)

    @property
    def environ(self) -> dict[str, str]:
        return {"FAKE_TRACKER_CALLS": str(self.calls_file), "TRACKIO_DIR": str(self.folder / "trackio-data")}

    def calls(self, name: str) -> list[dict[str, Any]]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [given for call, given in map(json.loads, lines) if call == name]
