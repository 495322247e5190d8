"""Rotary position embedding of queries and keys, both in one launch, from float32 tables.

The first R features of each head (R = D except under partial rotary) are R/2 pairs (i, i + R/2), each turned by the
angle position * frequency_i, as Hugging Face's Llama has it:

    first'  = first * cos - second * sin
    second' = second * cos + first * sin

A rotation's transpose is the rotation by the opposite angle, so backward is the same kernel with -sin, and nothing is
saved. The tables stay float32: in bfloat16 an angle near position 10,000 is off by tens of radians' worth of rounding,
and a rounded cosine turns every key by the same small wrong amount for good.

B batch, S sequence, N heads, K kv heads, D head dim, R rotated features, P table rows.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, launch, next_power_of_2, on_triton, tl, triton


def rope_tables(
    inverse_frequency: torch.Tensor, length: int, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), float32 [length, R/2], for positions 0 .. length - 1.

    inverse_frequency: float32 [R/2], with whatever a model does to it for long contexts already done. scaling: its
    attention factor (1 but for YaRN and LongRoPE), multiplied into both."""
    positions = torch.arange(length, device=inverse_frequency.device, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequency.float())
    return angles.cos() * scaling, angles.sin() * scaling


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated copies of q [B, S, N, D] and k [B, S, K, D]; any strides with the last one 1. Differentiable in both.

    cos, sin: float32 [P, R/2], R <= D even. positions: int64 [B, S] rows of the tables, None for 0 .. S - 1.
    Raises ValueError on wrong shapes. The caller sees to it that positions are below P."""
    turned: tuple[torch.Tensor, torch.Tensor] = _Rope.apply(q, k, cos, sin, positions)
    return turned


def rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    backward: bool = False,
    inverse: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Rotates q and k where they lie (shapes as `rope`), outside autograd; by the opposite angle if `backward`.

    inverse: undoes a rotation, whose tables may be times a scaling: `backward` over cos^2 + sin^2.

    out: (q, k) of the same shapes and dtype, any strides with the last one 1, to write to instead."""
    _check(q, k, cos, sin, positions)
    out = (q, k) if out is None else out
    for given, place in zip((q, k), out, strict=True):
        if place.shape != given.shape or place.dtype != given.dtype or place.stride(3) != 1:
            raise ValueError(
                f"out must be {given.dtype} {tuple(given.shape)} with stride 1 along D, "
                f"got {place.dtype} {tuple(place.shape)} with strides {place.stride()}"
            )
    if on_triton(q):
        _launch(q, k, cos, sin, positions, backward or inverse, inverse, out)
    else:
        for heads, place in zip((q, k), out, strict=True):
            _plain(heads, cos, sin, positions, backward or inverse, inverse, place)


def _check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None
) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise ValueError(f"q and k must be [B, S, heads, D] of one dtype, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.stride(3) != 1 or k.stride(3) != 1:
        raise ValueError(f"q and k must have stride 1 along D, got {q.stride()} and {k.stride()}")
    if cos.ndim != 2 or cos.shape != sin.shape or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must be float32 [P, R/2], got {cos.dtype} {tuple(cos.shape)}")
    if not cos.is_contiguous() or not sin.is_contiguous() or 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(f"cos and sin must be contiguous, 2 x {cos.shape[1]} features at most D = {q.shape[3]}")
    if positions is None and cos.shape[0] < q.shape[1]:
        raise ValueError(f"the tables hold {cos.shape[0]} positions, the sequence is {q.shape[1]} long")
    if positions is not None and (positions.shape != q.shape[:2] or positions.dtype != torch.int64):
        raise ValueError(f"positions must be int64 {tuple(q.shape[:2])}, got {positions.dtype} {positions.shape}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tables = cos, sin, positions
        q, k = _copy(q), _copy(k)
        rope_(q, k, cos, sin, positions)
        return q, k

    @staticmethod
    def backward(ctx: Any, d_q: torch.Tensor, d_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        d_q, d_k = _copy(d_q), _copy(d_k)
        rope_(d_q, d_k, *ctx.tables, backward=True)
        return d_q, d_k, None, None, None


def _copy(x: torch.Tensor) -> torch.Tensor:
    """A copy that may be written: an expanded tensor's own strides would alias."""
    return x.clone(memory_format=torch.contiguous_format)


# ---- meaning, and the path on a CPU


def _plain(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    backward: bool,
    inverse: bool,
    out: torch.Tensor,
) -> None:
    half = cos.shape[1]
    rows = slice(0, heads.shape[1]) if positions is None else positions
    cos, sin = cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)  # [(B,) S, 1, R/2]
    if backward:
        sin = -sin
    if heads.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    if inverse:
        size = cos * cos + sin * sin
        cos, sin = cos / size, sin / size
    first, second = heads[..., :half].to(cos.dtype), heads[..., half : 2 * half].to(cos.dtype)
    turned = first * cos - second * sin, second * cos + first * sin
    if out is not heads:
        out.copy_(heads)
    out[..., :half] = turned[0]
    out[..., half : 2 * half] = turned[1]


# ---- Triton: a program turns up to HEADS heads, of q or of k, at one token


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, sequence, n_q, n_k,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n,
    q_out_stride_b, q_out_stride_s, q_out_stride_n, k_out_stride_b, k_out_stride_s, k_out_stride_n,
    HALF: tl.constexpr, HALF_TILE: tl.constexpr, HEADS: tl.constexpr, Q_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    REST: tl.constexpr, REST_TILE: tl.constexpr, POSITIONS: tl.constexpr, BACKWARD: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = program // GROUPS
    group = program % GROUPS
    b = (token // sequence).to(tl.int64)
    s = (token % sequence).to(tl.int64)
    place = s
    if POSITIONS:
        place = tl.load(positions_ptr + token).to(tl.int64)
    feature = tl.arange(0, HALF_TILE)
    in_half = feature < HALF
    cos = tl.load(cos_ptr + place * HALF + feature, mask=in_half, other=1.0)[None, :]
    sin = tl.load(sin_ptr + place * HALF + feature, mask=in_half, other=0.0)[None, :]
    if BACKWARD:
        sin = -sin
    if INVERSE:
        size = cos * cos + sin * sin
        cos = cos / size
        sin = sin / size

    if group < Q_GROUPS:
        ptr = q_ptr + b * q_stride_b + s * q_stride_s
        stride = q_stride_n
        out_ptr = q_out_ptr + b * q_out_stride_b + s * q_out_stride_s
        out_stride = q_out_stride_n
        n = n_q
        first_head = group * HEADS
    else:
        ptr = k_ptr + b * k_stride_b + s * k_stride_s
        stride = k_stride_n
        out_ptr = k_out_ptr + b * k_out_stride_b + s * k_out_stride_s
        out_stride = k_out_stride_n
        n = n_k
        first_head = (group - Q_GROUPS) * HEADS
    head = first_head + tl.arange(0, HEADS)
    heads = ptr + head.to(tl.int64)[:, None] * stride
    heads_out = out_ptr + head.to(tl.int64)[:, None] * out_stride
    live = (head < n)[:, None] & in_half[None, :]
    first = tl.load(heads + feature[None, :], mask=live, other=0.0).to(tl.float32)
    second = tl.load(heads + HALF + feature[None, :], mask=live, other=0.0).to(tl.float32)
    turned = first * cos - second * sin
    tl.store(heads_out + feature[None, :], turned.to(q_ptr.dtype.element_ty), mask=live)
    turned = second * cos + first * sin
    tl.store(heads_out + HALF + feature[None, :], turned.to(q_ptr.dtype.element_ty), mask=live)
    if REST:  # of partial rotary, where the result lies elsewhere
        feature = 2 * HALF + tl.arange(0, REST_TILE)
        live = (head < n)[:, None] & (feature < 2 * HALF + REST)[None, :]
        same = tl.load(heads + feature[None, :], mask=live, other=0.0)
        tl.store(heads_out + feature[None, :], same, mask=live)


@cost_of(_rope_kernel)
def _cost(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=2 * (q.nbytes + k.nbytes))


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    backward: bool,
    inverse: bool,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    batch, sequence, n_q, _ = q.shape
    n_k = k.shape[2]
    heads = min(16, next_power_of_2(max(n_q, n_k)))
    q_groups, k_groups = cdiv(n_q, heads), cdiv(n_k, heads)
    half = cos.shape[1]
    q_out, k_out = out
    rest = 0 if q_out is q and k_out is k else q.shape[3] - 2 * half
    n_programs = batch * sequence * (q_groups + k_groups)
    if n_programs:
        launch(
            _rope_kernel, (n_programs,),
            q, k, q_out, k_out, cos, sin, q if positions is None else positions.contiguous(), sequence, n_q, n_k,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            HALF=half, HALF_TILE=next_power_of_2(half), HEADS=heads, Q_GROUPS=q_groups, GROUPS=q_groups + k_groups,
            REST=rest, REST_TILE=next_power_of_2(max(1, rest)), POSITIONS=positions is not None, BACKWARD=backward,
            INVERSE=inverse, num_warps=4,
        )  # fmt: skip
