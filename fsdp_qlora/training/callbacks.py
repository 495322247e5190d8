"""The protocol of what follows a run step by step: metrics, the profiler, and what a later feature adds."""

from typing import Protocol

from fsdp_qlora.report.step_record import StepRecord


class Callback(Protocol):
    """A listener of the training loop, on every rank; the loop calls its listeners in order."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of a finished optimizer step. It runs between two steps."""
