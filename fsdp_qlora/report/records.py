"""What one optimizer step, and one evaluation, came to: what is recorded, plotted and shown of it."""

import math
from dataclasses import dataclass, field

STEPS = "metrics.jsonl"  # a line for each step and each evaluation
ANSWERS = "eval_answers.jsonl"  # beside it, and cut where that is: lines with a step, of who writes them


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step over all ranks. Per-rank lists are in rank order."""

    step: int  # from 1
    epoch: float  # epochs completed after this step: its rows and those before it, in parts of the dataset
    loss: float  # mean over the step's label tokens, all ranks
    lr: float
    grad_norm: float  # before clipping
    rows: int  # all ranks
    tokens: int  # all ranks, padding excluded
    label_tokens: int  # all ranks
    seconds: float  # since the end of the step before
    gpu_allocated_gib: list[float]  # peak so far; empty without GPUs
    gpu_reserved_gib: list[float]
    gpu_retries: list[int]  # times so far that the allocator had to wait and give memory back before it found some
    host_rss_gib: list[float]  # proportional set size: the sum is what the job takes from the machine
    # Bytes of this step over each card's link, that were copied by engines: see memory.host_link.Traffic.
    link_to_gpu_gib: list[float] = field(default_factory=list)  # empty without GPUs
    link_from_gpu_gib: list[float] = field(default_factory=list)
    step_retries: int = 0  # times that this step was begun again with less saved, after GPU memory had run out

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def perplexity_of(loss: float) -> float:
    """Return exp(loss); infinite where that is more than a float holds."""
    return math.exp(loss) if not loss >= 700 else math.inf  # NaN stays NaN


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation over all ranks, between two optimizer steps."""

    step: int  # optimizer steps done before it
    epoch: float  # epochs completed by then, fractions included
    loss: float  # mean over the label tokens of all evaluated rows
    label_tokens: int
    tokens: int  # padding excluded
    rows: int
    seconds: float
    is_best: bool  # the lowest loss so far

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"evaluation loss {self.loss}: no improvement, and training goes on"
        best = ", the lowest so far" if self.is_best else ""
        return f"evaluation loss {self.loss:.4f}{best}, perplexity {self.perplexity:.4g}"
