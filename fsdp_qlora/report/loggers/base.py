"""The protocol of a logger, and what opens it."""

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from fsdp_qlora.config.options import Config


class Logger(Protocol):
    """One run's place in a tracker. Made on rank 0 only; what its methods raise is told and does not end the run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of a step. Called on a thread of its own. Values may be NaN or infinite."""

    def close(self, failed: bool) -> None:
        """End the run there. failed: training stopped with an error."""

    @property
    def place(self) -> str:
        """Location of what was logged, for the user."""


class LoggerSpec(NamedTuple):
    """What `log_to` can name."""

    open: Callable[[Config], Logger]  # starts it, on one rank; what it raises is the user's to mend
    package: str | None = None  # that must be installed
    remedy: str = "see its documentation"  # where it cannot start


def as_texts(config: Config) -> dict[str, str]:
    """Return option -> value in words, for loggers that take texts only."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in config.to_flat().items()
    }
