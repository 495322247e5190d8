"""SwanLab."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdp_qlora.config.options import Config


class Swanlab:
    def __init__(self, config: Config) -> None:
        import swanlab

        options = config.output
        self._run: Any = swanlab.init(
            project=options.project_name,
            name=options.name,
            group=options.group,
            workspace=options.entity,
            config=config.to_flat(),
            log_dir=str(Path(options.output_dir) / "swanlog"),
        )
        self.place = str(self._run.url if self._run.mode == "online" else self._run.dir)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        if failed:
            self._run.finish(state="crashed", error="training stopped")
        else:
            self._run.finish()
