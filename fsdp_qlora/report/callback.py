"""The base of what follows a run step by step: metrics, the profiler, and what a later feature adds."""

from pathlib import Path

from fsdp_qlora.report.records import EvalRecord, StepRecord


class Callback:
    """A listener of the training loop, on every rank; the loop calls its listeners in order, between two steps."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of a finished optimizer step."""

    def on_failed_step(self, record: StepRecord) -> None:
        """Take note of a step whose loss or gradient is not finite: it updated nothing, and the run ends."""

    def on_eval(self, record: EvalRecord) -> None:
        """Take note of a finished evaluation."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Take note of a checkpoint, as of `step`, that is whole on disk."""
