"""What loggers plot of a step and of an evaluation: one number for each name."""

from collections.abc import Sequence

from fsdp_qlora.report.records import EvalRecord, StepRecord


def step_scalars(record: StepRecord) -> dict[str, float]:
    """Return a step's numbers: the fullest card, the busiest link, the whole host."""
    values = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/seconds_per_step": record.seconds,
        "memory/host_gib": sum(record.host_rss_gib),
    }
    if record.gpu_allocated_gib:
        values["memory/gpu_allocated_gib"] = max(record.gpu_allocated_gib)
        values["memory/gpu_reserved_gib"] = max(record.gpu_reserved_gib)
    for name, moved in (("to_gpu", record.link_to_gpu_gib), ("from_gpu", record.link_from_gpu_gib)):
        if moved:
            values[f"link/{name}_gib_per_second"] = _per_second(moved, record.seconds)
    return values


def eval_scalars(record: EvalRecord) -> dict[str, float]:
    """Return an evaluation's numbers."""
    return {
        "eval/loss": record.loss,
        "eval/perplexity": record.perplexity,
        "eval/epoch": record.epoch,
        "eval/seconds": record.seconds,
        "eval/tokens_per_second": _per_second([record.tokens], record.seconds),
    }


def _per_second(of_ranks: Sequence[float], seconds: float) -> float:
    return max(of_ranks) / seconds if seconds > 0 else 0.0
