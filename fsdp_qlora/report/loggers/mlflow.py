"""MLflow: the store that MLFLOW_TRACKING_URI names, else its own default.

By its client alone: `mlflow.start_run` would leave a run that is ended when the process ends, which takes
minutes where the server is gone."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fsdp_qlora.config.options import Config
from fsdp_qlora.report.loggers.base import as_texts

PARAMS_AT_ONCE = 100  # the most that MLflow takes in one call
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FEW_RETRIES = "2"  # a few seconds; MLflow's own 7 take minutes


class Mlflow:
    def __init__(self, config: Config) -> None:
        import mlflow
        from mlflow.tracking.context.registry import resolve_tags

        options = config.output
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        tags = {"group": options.group} if options.group is not None else {}
        with _few_retries():
            run = self._client.create_run(
                self._experiment(options.project_name), tags=resolve_tags(tags), run_name=options.name
            )
            self._id = run.info.run_id
            params = [mlflow.entities.Param(name, text) for name, text in as_texts(config).items()]
            for first in range(0, len(params), PARAMS_AT_ONCE):
                self._client.log_batch(self._id, params=params[first : first + PARAMS_AT_ONCE])
        self.place = f"{mlflow.get_tracking_uri()}, experiment {options.project_name}, run {run.info.run_name}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics: list[Any] = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, failed: bool) -> None:
        with _few_retries():
            self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _experiment(self, name: str) -> str:
        """Return the id of the experiment of that name, made where there is none."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except Exception:  # another run that starts now may have made it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


@contextmanager
def _few_retries() -> Iterator[None]:
    """Let a server that does not answer be an error in seconds, unless the user has set how often to ask."""
    if RETRIES in os.environ:
        yield
        return
    os.environ[RETRIES] = FEW_RETRIES
    try:
        yield
    finally:
        del os.environ[RETRIES]
