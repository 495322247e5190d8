"""What one optimizer step came to: what is recorded, plotted and shown of it."""

from dataclasses import dataclass, field


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
