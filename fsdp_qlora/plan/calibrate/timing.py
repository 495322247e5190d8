"""Seconds of calls on a GPU's current stream; for what measures rates."""

from collections.abc import Callable

import torch

SPAN = 0.02  # seconds that a rate is measured for, at least three calls


def seconds(call: Callable[[], object], span: float = SPAN) -> float:
    """Of one call on the current stream, when many are queued behind each other."""
    call()
    first = events(call, 1)
    return events(call, max(3, min(50, int(span / max(first, 1e-6)))))


def events(call: Callable[[], object], repeats: int) -> float:
    """Of one of so many calls, by the stream's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / repeats
