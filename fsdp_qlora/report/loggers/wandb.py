"""Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from fsdp_qlora.config.options import Config


class Wandb:
    def __init__(self, config: Config) -> None:
        import wandb

        options = config.output
        self._run: Any = wandb.init(
            project=options.project_name,
            name=options.name,
            group=options.group,
            entity=options.entity,
            config=config.to_flat(),
            dir=options.output_dir,
        )
        self.place = str(self._run.url or self._run.dir)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
