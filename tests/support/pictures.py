"""Runs that draw no loss curve: drawing takes as long as a tiny model's ten steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from fsdp_qlora.report import metrics


@contextmanager
def without_pictures() -> Iterator[None]:
    """Let each run's loss.png be an empty file, for as long as the context lasts."""
    with patch.object(metrics, "draw_loss_curve", _draw_nothing):
        yield


def _draw_nothing(path: Path, *_: object) -> None:
    path.touch()
