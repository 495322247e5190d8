"""trackio: a database of this machine, or a Space or server that its own environment variables name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdp_qlora.config.options import Config


class Trackio:
    def __init__(self, config: Config) -> None:
        import trackio
        from trackio.utils import TRACKIO_DIR

        elsewhere = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        if not elsewhere:
            _check_writable(Path(TRACKIO_DIR))
        options = config.output
        self._run: Any = trackio.init(
            project=options.project_name,
            name=options.name,
            group=options.group,
            config=config.to_flat(),
            embed=False,
        )
        self.place = elsewhere or f'{TRACKIO_DIR} (trackio show --project "{options.project_name}")'

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


def _check_writable(folder: Path) -> None:
    """Raise OSError where trackio could not write: it only warns of that, and records nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
