"""Attention's backends: for each what it can do, its two passes, and the memory that it takes; in a table.

`math` is plain PyTorch (`attention_math.py`). `cpu` is PyTorch's fused attention for CPUs, 3 to 8 times faster (and the
one that does repeat keys and values). `flash` is FlashAttention-2 inside PyTorch, `cudnn` cuDNN's fused attention,
`flash_attn` the package of that name (the only fused one with a softcap).

B batch, S sequence, N query heads, K key/value heads, D head dim.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fsdp_qlora.kernels.attention_math import Gradients, Masking, Stats, math_backward, math_forward
from fsdp_qlora.kernels.attention_on_meta import fused_workspace, math_workspace, split_workspace
from fsdp_qlora.kernels.attention_segments import backward_by_parts, forward_by_parts, one_by_one
from fsdp_qlora.kernels.device import deterministic
from fsdp_qlora.kernels.segments import Group, Segments


class Backend(NamedTuple):
    """One implementation of attention's two passes.

    segments: bounds of documents that q, k and v [1, T, heads, D] hold one after the other; None: each of the B rows is
    one."""

    name: str
    supports: Callable[[torch.device, torch.dtype, int, int, Masking], bool]  # sequence and head dim in the middle
    # (q, k, v, masking, segments) -> out, stats
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Masking, Segments | None], tuple[torch.Tensor, Stats]]
    backward: Callable[..., Gradients]  # takes the stats that its own forward returned, and the segments last
    workspace_bytes: Callable[[torch.Tensor, torch.Tensor], tuple[int, int]]  # (forward, backward) from q and k
    saves_inputs: bool = False  # True: its stats hold q, k and v
    takes_segments: bool = True


def is_windowed(masking: Masking, sequence: int) -> bool:
    """Return whether a window hides keys of rows of that length."""
    return masking.window is not None and masking.window < sequence


def _fits_gpu(device: torch.device, dtype: torch.dtype, head_dim: int, widest: int) -> bool:
    """Return whether kernels for 16-bit dtypes take such heads."""
    sixteen = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return sixteen and head_dim % 8 == 0 and head_dim <= widest


def _cpu_supports(device: torch.device, dtype: torch.dtype, sequence: int, head_dim: int, masking: Masking) -> bool:
    return device.type == "cpu" and masking.softcap is None and not is_windowed(masking, sequence)


def _package_supports(device: torch.device, dtype: torch.dtype, sequence: int, head_dim: int, masking: Masking) -> bool:
    return _fits_gpu(device, dtype, head_dim, 256) and importlib.util.find_spec("flash_attn") is not None


def _flash_supports(device: torch.device, dtype: torch.dtype, sequence: int, head_dim: int, masking: Masking) -> bool:
    return _fits_gpu(device, dtype, head_dim, 256) and masking.softcap is None


def _cudnn_supports(device: torch.device, dtype: torch.dtype, sequence: int, head_dim: int, masking: Masking) -> bool:
    fits = _fits_gpu(device, dtype, head_dim, 128)
    return fits and masking.softcap is None and not is_windowed(masking, sequence)


def _math_supports(device: torch.device, dtype: torch.dtype, sequence: int, head_dim: int, masking: Masking) -> bool:
    return True


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


def _cpu_sums(q: torch.Tensor, k: torch.Tensor) -> tuple[int, ...]:
    return 1, q.shape[2], q.shape[1]


def _math_sums(q: torch.Tensor, k: torch.Tensor) -> tuple[int, ...]:
    return 1, k.shape[2], q.shape[2] // k.shape[2], q.shape[1]


# ---- FlashAttention-2 inside PyTorch, in its form for rows of any lengths one after the other


def _flash_window(masking: Masking) -> dict[str, int]:
    return {} if masking.window is None else {"window_size_left": masking.window - 1, "window_size_right": 0}


def _equal_starts(q: torch.Tensor) -> torch.Tensor:
    """Return int32 [B + 1], the first token of each row and the end."""
    b, s = q.shape[:2]
    return torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=q.device)


def _groups(q: torch.Tensor, segments: Segments | None, starts: torch.Tensor | None) -> list[Group]:
    """Return the groups of documents; where there are none, all rows, with these starts, as one."""
    if starts is None:
        assert segments is not None
        return segments.groups
    return [Group(slice(0, q.shape[0] * q.shape[1]), starts, q.shape[1])]


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[B, S, heads, D] -> [1, T, heads, D]."""
    return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking, segments: Segments | None
) -> tuple[torch.Tensor, Stats]:
    first = _equal_starts(q) if segments is None else None
    groups, rngs = _groups(q, segments, first), list[Stats]()

    def call(i: int, *qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, starts, longest = groups[i]
        out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            *(x[0] for x in qkv), starts, starts, longest, longest, 0.0, True, False,
            scale=masking.scale, **_flash_window(masking),
        )  # fmt: skip
        rngs.append((rng, unused))
        return out[None], lse

    out, sums = forward_by_parts([group.tokens for group in groups], _flat(q), _flat(k), _flat(v), call)
    return out.view(q.shape), (sums, first, rngs)


def _flash_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: tuple[torch.Tensor, torch.Tensor | None, Sequence[tuple[torch.Tensor, torch.Tensor]]],
    masking: Masking,
    segments: Segments | None,
) -> Gradients:
    sums, first, rngs = stats
    groups = _groups(q, segments, first)

    def call(
        i: int,
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        sums: torch.Tensor,
    ) -> Gradients:
        _, starts, longest = groups[i]
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            *(x[0] for x in (d_out, q, k, v, out)), sums.view(q.shape[2], -1), starts, starts, longest, longest,
            0.0, True, *rngs[i], scale=masking.scale, **_flash_window(masking),
        )  # fmt: skip
        return d_q[None], d_k[None], d_v[None]

    d_flat, q_flat, k_flat, v_flat, out_flat = (_flat(x) for x in (d_out, q, k, v, out))
    parts = [group.tokens for group in groups]
    d_q, d_k, d_v = backward_by_parts(parts, d_flat, q_flat, k_flat, v_flat, out_flat, sums, call)
    return d_q.view(q.shape), d_k.view(k.shape), d_v.view(v.shape)


# ---- cuDNN


def _cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking, segments: Segments | None
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
    segments: Segments | None,
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking, segments: Segments | None
) -> tuple[torch.Tensor, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    import flash_attn

    window = (-1, -1) if masking.window is None else (masking.window - 1, 0)
    options = {
        "softmax_scale": masking.scale, "causal": True, "window_size": window, "softcap": masking.softcap or 0.0,
        "deterministic": deterministic(),
    }  # fmt: skip
    leaves, outs = list[torch.Tensor](), list[torch.Tensor]()
    with torch.enable_grad():
        if segments is None:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            outs = [flash_attn.flash_attn_func(*leaves, **options)]
        for tokens, starts, longest in [] if segments is None else segments.groups:
            group = [x[0, tokens].detach().requires_grad_() for x in (q, k, v)]
            leaves += group
            outs.append(flash_attn.flash_attn_varlen_func(*group, starts, starts, longest, longest, **options))
    out = outs[0].detach() if len(outs) == 1 else torch.cat([out.detach() for out in outs])
    return out.view(q.shape), (leaves, outs)


def _package_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    masking: Masking,
    segments: Segments | None,
) -> Gradients:
    leaves, outs = stats
    if segments is None:
        d_q, d_k, d_v = torch.autograd.grad(outs, leaves, d_out)
        return d_q, d_k, d_v
    grads = torch.autograd.grad(outs, leaves, [d_out[0, group.tokens] for group in segments.groups])
    d_q, d_k, d_v = (grads[i] if len(outs) == 1 else torch.cat(grads[i::3]) for i in range(3))
    return d_q.view(q.shape), d_k.view(k.shape), d_v.view(v.shape)


# In order of preference where nothing can be measured; the last one takes everything.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", _cpu_supports, *one_by_one(_cpu_forward, _cpu_backward, _cpu_sums), math_workspace),
        Backend(
            "flash_attn", _package_supports, _package_forward, _package_backward, split_workspace, saves_inputs=True
        ),
        Backend("flash", _flash_supports, _flash_forward, _flash_backward, split_workspace),
        Backend("cudnn", _cudnn_supports, _cudnn_forward, _cudnn_backward, fused_workspace, takes_segments=False),
        Backend("math", _math_supports, *one_by_one(math_forward, math_backward, _math_sums), math_workspace),
    )
}
