"""Causal attention with its backward in the caller's hands: grouped heads, window, softcap, one of five backends.

    scores = softcap(scale * q k^T),  softcap(s) = c * tanh(s / c)       key j is seen by query i if i - window < j <= i
    out = softmax(scores) v                                               stats: log-sum-exp of each row of scores

A block that decides for itself what it keeps needs the two passes apart: `attend` returns the output and what backward
needs beside q, k, v and it; `attend_backward` takes them, kept or computed again. On a GPU keys and values are never
repeated for the query heads that share them.

Backends: `math` is plain PyTorch in float32, in pieces of queries so that no S x S matrix exists: the meaning. `cpu` is
PyTorch's fused attention for CPUs, 3 to 8 times faster (and the one that does repeat keys and values). `flash` is
FlashAttention-2 inside PyTorch, `cudnn` cuDNN's fused attention, `flash_attn` the package of that name (the only fused
one with a softcap). Which is fastest differs by card and shape, so `fastest` measures.

cuDNN's backward adds to the gradient of the queries in the order in which its parts end, and so do both others of
FlashAttention unless they are told otherwise. PyTorch (2.11, 2.13) tells its own where deterministic algorithms are
asked for, and cuDNN in no case. So `DETERMINISTIC` has what is possible there.

B batch, S sequence, N query heads, K key/value heads, D head dim.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch

from fsdp_qlora.kernels.attention_on_meta import backward as backward_on_meta
from fsdp_qlora.kernels.attention_on_meta import forward as forward_on_meta
from fsdp_qlora.kernels.device import deterministic

# Backends whose two passes can give the same bits each time, the one to be taken first: of `flash_attn` a block keeps
# nothing, and which of the two is faster cannot be asked, since the answer may differ from run to run.
DETERMINISTIC = ("cpu", "flash", "flash_attn", "math")
_PIECE = 512  # queries at a time in the math backend

# What a backend's backward needs beside q, k, v and out: a tensor, or tensors and integers as its library groups them.
Stats: TypeAlias = torch.Tensor | int | Sequence["Stats"] | None
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # d_q, d_k, d_v


class Masking(NamedTuple):
    """What shapes the scores. scale: of q k^T. window: how many keys a query sees, itself included; None for all."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking, backend: str
) -> tuple[torch.Tensor, Stats]:
    """(out [B, S, N, D], stats) from q [B, S, N, D], k and v [B, S, K, D], outside autograd."""
    if q.is_meta:
        return forward_on_meta(q, k, v, masking.window, backend)
    return _FORWARD[_able(backend, q)](q, k, v, masking)


def attend_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: Stats,
    masking: Masking,
    backend: str,
) -> Gradients:
    """(d_q, d_k, d_v), shaped as q, k, v, from what `attend` was given and returned."""
    if q.is_meta:
        return backward_on_meta(q, k, v, masking.window, backend)
    return _BACKWARD[_able(backend, q)](d_out, q, k, v, out, stats, masking)


def _able(backend: str, q: torch.Tensor) -> str:
    """A backend is chosen for the longest rows; cuDNN does not take those of one token, of which there may be a few."""
    return "math" if backend == "cudnn" and q.shape[1] == 1 else backend


def possible(device: torch.device, dtype: torch.dtype, sequence: int, head_dim: int, masking: Masking) -> list[str]:
    """The backends that can do it, `math` last; where PyTorch is to be deterministic those of `DETERMINISTIC`."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
    windowed = masking.window is not None and masking.window < sequence
    names = []
    if device.type == "cpu" and masking.softcap is None and not windowed:
        names.append("cpu")
    if fits and importlib.util.find_spec("flash_attn") is not None and head_dim <= 256:
        names.append("flash_attn")
    if fits and masking.softcap is None and head_dim <= 256:
        names.append("flash")
    if fits and masking.softcap is None and not windowed and head_dim <= 128:
        names.append("cudnn")
    names.append("math")
    return [name for name in DETERMINISTIC if name in names] if deterministic() else names


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


# ---- math: the meaning


def _scores(q: torch.Tensor, k: torch.Tensor, masking: Masking, first: int) -> torch.Tensor:
    """Softcapped and masked scores of queries q [B, K, G, s, D], the first at position `first`, and k [B, K, S, D]."""
    scores = torch.einsum("bkgsd,bktd->bkgst", q, k) * masking.scale
    if masking.softcap is not None:
        scores = torch.tanh(scores / masking.softcap) * masking.softcap
    rows = torch.arange(first, first + q.shape[3], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)[None, :]
    hidden = columns > rows
    if masking.window is not None:
        hidden = hidden | (columns <= rows - masking.window)
    return scores.masked_fill(hidden, -math.inf)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, S, N, D] -> [B, K, G, S, D] in at least float32."""
    b, s, n, d = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.view(b, s, kv_heads, n // kv_heads, d).permute(0, 2, 3, 1, 4)


def _ungrouped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    b, k, g, s, d = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(b, s, k * g, d).to(like.dtype)


def _math_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys, values = _grouped(q, k.shape[2]), _grouped(k, k.shape[2])[:, :, 0], _grouped(v, v.shape[2])[:, :, 0]
    outs, sums = [], []
    for first in range(0, q.shape[1], _PIECE):
        scores = _scores(queries[:, :, :, first : first + _PIECE], keys, masking, first)
        outs.append(torch.einsum("bkgst,bktd->bkgsd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return _ungrouped(torch.cat(outs, 3), q), torch.cat(sums, 3)


def _math_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    masking: Masking,
) -> Gradients:
    kv_heads = k.shape[2]
    queries, keys, values = _grouped(q, kv_heads), _grouped(k, kv_heads)[:, :, 0], _grouped(v, kv_heads)[:, :, 0]
    d_outs = _grouped(d_out, kv_heads)
    d_keys, d_values, d_queries = torch.zeros_like(keys), torch.zeros_like(values), []
    for first in range(0, q.shape[1], _PIECE):
        piece = slice(first, first + _PIECE)
        scores = _scores(queries[:, :, :, piece], keys, masking, first)
        p = torch.exp(scores - lse[:, :, :, piece, None])
        d_o = d_outs[:, :, :, piece]
        d_values += torch.einsum("bkgst,bkgsd->bktd", p, d_o)
        d_p = torch.einsum("bkgsd,bktd->bkgst", d_o, values)
        d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True))  # exactly 0 where a query sees one key
        if masking.softcap is not None:
            d_scores *= 1 - (scores.masked_fill(p == 0, 0.0) / masking.softcap).square()
        d_scores *= masking.scale
        d_queries.append(torch.einsum("bkgst,bktd->bkgsd", d_scores, keys))
        d_keys += torch.einsum("bkgst,bkgsd->bktd", d_scores, queries[:, :, :, piece])
    return (
        _ungrouped(torch.cat(d_queries, 3), q),
        _ungrouped(d_keys[:, :, None], k),
        _ungrouped(d_values[:, :, None], v),
    )


# ---- PyTorch's for CPUs


def _heads_first(q: torch.Tensor, *keys_and_values: torch.Tensor) -> list[torch.Tensor]:
    """[B, N, S, D] of each, the keys and values repeated for the heads that share them."""
    return [x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], dim=1) for x in (q, *keys_and_values)]


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), 0.0, True, scale=masking.scale
    )
    return out.transpose(1, 2), lse


def _cpu_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    masking: Masking,
) -> Gradients:
    d_q, *d_kv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out.transpose(1, 2), *_heads_first(q, k, v), out.transpose(1, 2), lse, 0.0, True, scale=masking.scale
    )
    d_k, d_v = (d.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2) for d in d_kv)
    return d_q.transpose(1, 2), d_k, d_v


# ---- FlashAttention-2 inside PyTorch, in its form for rows of any lengths one after the other


def _flash_window(masking: Masking) -> dict[str, int]:
    return {} if masking.window is None else {"window_size_left": masking.window - 1, "window_size_right": 0}


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    b, s, n, d = q.shape
    starts = torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=q.device)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        *(x.reshape(b * s, -1, d) for x in (q, k, v)), starts, starts, s, s, 0.0, True, False,
        scale=masking.scale, **_flash_window(masking),
    )  # fmt: skip
    return out.view(b, s, n, d), (lse, starts, rng, unused)


def _flash_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: tuple[torch.Tensor, ...],
    masking: Masking,
) -> Gradients:
    b, s, _, d = q.shape
    lse, starts, rng, unused = stats
    grads = torch.ops.aten._flash_attention_backward(
        *(x.reshape(b * s, -1, d) for x in (d_out, q, k, v, out)), lse, starts, starts, s, s, 0.0, True, rng, unused,
        scale=masking.scale, **_flash_window(masking),
    )  # fmt: skip
    d_q, d_k, d_v = (grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
    return d_q, d_k, d_v


# ---- cuDNN


def _cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking
) -> tuple[torch.Tensor, list[Stats]]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, *stats, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, True, False, scale=masking.scale
    )
    return out.transpose(1, 2), stats


def _cudnn_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: Sequence[Stats],
    masking: Masking,
) -> Gradients:
    lse, starts_q, starts_k, max_q, max_k, seed, offset = stats
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(x.transpose(1, 2) for x in (d_out, q, k, v, out)), lse, seed, offset, None, starts_q, starts_k,
        max_q, max_k, 0.0, True, scale=masking.scale,
    )  # fmt: skip
    d_q, d_k, d_v = (grad.transpose(1, 2) for grad in grads)
    return d_q, d_k, d_v


# ---- the flash-attn package: through its public, differentiable function; stats is the small graph it leaves


def _package_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking
) -> tuple[torch.Tensor, tuple[list[torch.Tensor], torch.Tensor]]:
    from flash_attn import flash_attn_func

    window = (-1, -1) if masking.window is None else (masking.window - 1, 0)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn_func(
            *leaves, softmax_scale=masking.scale, causal=True, window_size=window, softcap=masking.softcap or 0.0,
            deterministic=deterministic(),
        )  # fmt: skip
    return out.detach(), (leaves, out)


def _package_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: tuple[list[torch.Tensor], torch.Tensor],
    masking: Masking,
) -> Gradients:
    leaves, graph = stats
    d_q, d_k, d_v = torch.autograd.grad(graph, leaves, d_out)
    return d_q, d_k, d_v


_FORWARD: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Masking], tuple[torch.Tensor, Stats]]] = {
    "math": _math_forward,
    "cpu": _cpu_forward,
    "flash": _flash_forward,
    "cudnn": _cudnn_forward,
    "flash_attn": _package_forward,
}
_BACKWARD: dict[str, Callable[..., Gradients]] = {  # each takes the stats that its own forward returned
    "math": _math_backward,
    "cpu": _cpu_backward,
    "flash": _flash_backward,
    "cudnn": _cudnn_backward,
    "flash_attn": _package_backward,
}
