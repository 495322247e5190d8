"""Causal attention with its backward in the caller's hands: grouped heads, window, softcap, by one of several backends.

    scores = softcap(scale * q k^T),  softcap(s) = c * tanh(s / c)       key j is seen by query i if i - window < j <= i
    out = softmax(scores) v                                               stats: log-sum-exp of each row of scores

A block that decides for itself what it keeps needs the two passes apart: `attend` returns the output and what backward
needs beside q, k, v and it; `attend_backward` takes them, kept or computed again. On a GPU keys and values are never
repeated for the query heads that share them.

The backends are in `attention_backends.py`. Which is fastest differs by card and shape, so `fastest` measures.

cuDNN's backward adds to the gradient of the queries in the order in which its parts end, and so do both others of
FlashAttention unless they are told otherwise. PyTorch (2.11, 2.13) tells its own where deterministic algorithms are
asked for, and cuDNN in no case. So `DETERMINISTIC` has what is possible there.

B batch, S sequence, N query heads, K key/value heads, D head dim.
"""

import functools
import math

import torch

from fsdp_qlora.kernels.attention_backends import BACKENDS
from fsdp_qlora.kernels.attention_math import Gradients, Masking, Stats
from fsdp_qlora.kernels.attention_on_meta import backward as backward_on_meta
from fsdp_qlora.kernels.attention_on_meta import forward as forward_on_meta
from fsdp_qlora.kernels.device import deterministic
from fsdp_qlora.kernels.segments import Segments

__all__ = [
    "BACKENDS",
    "DETERMINISTIC",
    "Gradients",
    "Masking",
    "Stats",
    "attend",
    "attend_backward",
    "fastest",
    "for_segments",
    "possible",
]

# Backends whose two passes can give the same bits each time, the one to be taken first: of `flash_attn` a block keeps
# nothing, and which of the two is faster cannot be asked, since the answer may differ from run to run.
DETERMINISTIC = ("cpu", "flash", "flash_attn", "math")

# Backends that take documents one after the other, the one to be taken first: as for `DETERMINISTIC`.
SEGMENTED = ("flash", "flash_attn", "math")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masking: Masking,
    backend: str,
    segments: Segments | None = None,
) -> tuple[torch.Tensor, Stats]:
    """(out [B, S, N, D], stats) from q [B, S, N, D], k and v [B, S, K, D], outside autograd.

    segments: of the documents that one row (B = 1) consists of. No token sees another document."""
    if q.is_meta:
        chosen = BACKENDS[backend]
        return forward_on_meta(q, k, v, masking.window, chosen.workspace_bytes(q, k)[0], chosen.saves_inputs)
    return BACKENDS[_able(backend, q, masking, segments)].forward(q, k, v, masking, segments)


def attend_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: Stats,
    masking: Masking,
    backend: str,
    segments: Segments | None = None,
) -> Gradients:
    """(d_q, d_k, d_v), shaped as q, k, v, from what `attend` was given and returned."""
    if q.is_meta:
        return backward_on_meta(q, k, v, masking.window, BACKENDS[backend].workspace_bytes(q, k)[1])
    able = _able(backend, q, masking, segments)
    return BACKENDS[able].backward(d_out, q, k, v, out, stats, masking, segments)


def _able(backend: str, q: torch.Tensor, masking: Masking, segments: Segments | None) -> str:
    """A backend is chosen for the longest rows; cuDNN does not take those of one token, of which there may be a few."""
    if segments is not None:
        return for_segments(backend, q.device.type, q.dtype, q.shape[3], masking)
    return "math" if backend == "cudnn" and q.shape[1] == 1 else backend


@functools.cache
def for_segments(backend: str, device: str, dtype: torch.dtype, head_dim: int, masking: Masking) -> str:
    """Return what computes documents one after the other where `backend` computes rows of one length: itself, if it
    can."""
    if BACKENDS[backend].takes_segments:
        return backend
    can = (name for name in SEGMENTED if BACKENDS[name].supports(torch.device(device), dtype, 1, head_dim, masking))
    return next(can)


def possible(device: torch.device, dtype: torch.dtype, sequence: int, head_dim: int, masking: Masking) -> list[str]:
    """Return the backends that can do it, `math` last; those of `DETERMINISTIC` where PyTorch is deterministic."""
    names = DETERMINISTIC if deterministic() else tuple(BACKENDS)
    return [name for name in names if BACKENDS[name].supports(device, dtype, sequence, head_dim, masking)]


def fastest(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int], masking: Masking) -> str:
    """The backend with the least forward + backward time at shape (B, S, N, K, D), measured once; the first that runs
    where deterministic algorithms are asked for.

    A backend that fails on this card or shape is left out; `math` is what remains where all do."""
    return _chosen(device, dtype, shape, masking, deterministic())


@functools.cache
def _chosen(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    masking: Masking,
    first_that_runs: bool,
) -> str:
    b, s, n, kv, d = shape
    names = possible(device, dtype, s, d, masking)
    if device.type == "cpu" or len(names) == 1:
        return names[0]
    q, d_out = (torch.randn(b, s, n, d, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(b, s, kv, d, device=device, dtype=dtype) for _ in range(2))
    times = {}
    for name in names[:-1]:
        try:
            times[name] = _time(q, k, v, d_out, masking, name)
        except RuntimeError:  # this card or shape after all not supported by that library
            continue
        if first_that_runs:
            return name
    return min(times, key=times.__getitem__) if times else "math"


def _time(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    masking: Masking,
    backend: str,
    repeats: int = 5,
) -> float:
    """ms of forward and backward together, the best of `repeats`."""
    best = math.inf
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out, stats = attend(q, k, v, masking, backend)
        attend_backward(d_out, q, k, v, out, stats, masking, backend)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best
