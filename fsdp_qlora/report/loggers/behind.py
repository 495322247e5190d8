"""A logger behind a queue: numbers reach it on a thread of its own, so that no step waits for a network or a disk."""

import queue
import threading
from collections.abc import Callable, Mapping

from fsdp_qlora.errors import first_line
from fsdp_qlora.report.loggers.base import Logger

PATIENCE_SECONDS = 60.0  # at the end, for what a slow logger has not taken yet


class Behind:
    """One logger. What it raises is told once and does not end the run: later steps are offered to it all the same,
    since a network may come back."""

    def __init__(self, name: str, logger: Logger, say: Callable[[str], None]) -> None:
        self.name, self.place = name, logger.place
        self._logger, self._say = logger, say
        self._offered = self._lost = 0
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._take, name=f"log to {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the values and return."""
        self._offered += 1
        self._queue.put((step, dict(values)))

    def close(self, failed: bool, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for what is queued, end the logger's run, and say what it lacks."""
        self._queue.put(None)
        self._thread.join(patience_seconds)
        if self._thread.is_alive():
            self._say(
                f"log_to: {self.name} did not take the last numbers within {patience_seconds:g} s: it is left as it is"
            )
            return
        if self._lost:
            self._say(f"log_to: {self.name} lacks {self._lost} of {self._offered} records, which it did not take")
        try:
            self._logger.close(failed)
        except Exception as error:  # whatever a library raises: the run is over, and saved
            self._say(f"log_to: {self.name} did not end its run ({first_line(error)})")

    def _take(self) -> None:
        while (item := self._queue.get()) is not None:
            step, values = item
            try:
                self._logger.log(step, values)
            except Exception as error:  # whatever a library raises: training is worth more than its record
                self._lost += 1
                if self._lost == 1:
                    self._say(
                        f"log_to: {self.name} did not take step {step} ({first_line(error)}): training goes on, and "
                        "metrics.jsonl has every step"
                    )
