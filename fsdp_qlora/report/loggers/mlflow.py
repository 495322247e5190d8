"""MLflow: the store that MLFLOW_TRACKING_URI names, else its own default."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fsdp_qlora.config.options import Config
from fsdp_qlora.report.loggers.base import as_texts

PARAMS_AT_ONCE = 100  # the most that MLflow takes in one call
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
RETRIES_AT_START = "2"  # a few seconds; MLflow's own 7 take minutes, in which all ranks would wait


class Mlflow:
    def __init__(self, config: Config) -> None:
        import mlflow

        options = config.output
        with _few_retries():
            mlflow.set_experiment(options.project_name)
            tags = {"group": options.group} if options.group is not None else None
            run = mlflow.start_run(run_name=options.name, tags=tags)
            self._mlflow, self._id, self._client = mlflow, run.info.run_id, mlflow.MlflowClient()
            params = [mlflow.entities.Param(name, text) for name, text in as_texts(config).items()]
            for first in range(0, len(params), PARAMS_AT_ONCE):
                self._client.log_batch(self._id, params=params[first : first + PARAMS_AT_ONCE])
        self.place = f"{mlflow.get_tracking_uri()}, experiment {options.project_name}, run {run.info.run_name}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics: list[Any] = [self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)  # by the run's id: the active run is the main thread's alone

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


@contextmanager
def _few_retries() -> Iterator[None]:
    """Let a server that does not answer be an error in seconds, unless the user has set how often to ask."""
    if RETRIES in os.environ:
        yield
        return
    os.environ[RETRIES] = RETRIES_AT_START
    try:
        yield
    finally:
        del os.environ[RETRIES]
