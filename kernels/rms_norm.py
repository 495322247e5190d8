"""RMSNorm over the last axis with a frozen weight, optionally fused with the residual add before it.

    h = residual + x                                        (only if a residual is given; rounded to the dtype)
    y = h * rsqrt(mean(h^2) + eps) * (weight + shift)       shift 1 is Gemma's; all in float32, rounded once

The weight does not train, so backward is dX alone. r = rsqrt(mean(h^2) + eps), n = h * r, g = dy * (weight + shift):

    d_h = r * (g - n * mean(g * n))   (+ the gradient that reaches h by its other path)

and since a row is in registers anyway, r is computed again rather than saved: nothing but h is kept. A row is one
reduction; short rows (a head's, in Qwen3's and Gemma 3's q and k norms) share a program so that its threads are busy.

T rows, H row length.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty_like, launch, next_power_of_2, on_triton, tl, triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, shift: float = 0.0) -> torch.Tensor:
    """y [..., H] of x's dtype, from x [..., H] and weight [H] (any floating dtype). Differentiable in x.

    Raises ValueError if the shapes do not fit or the weight wants a gradient."""
    _check(x, weight)
    y: torch.Tensor = _RMSNorm.apply(x.contiguous(), weight, eps, shift)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, shift: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, y): h = residual + x and its RMSNorm, all [..., H] of one dtype. Differentiable in x and residual."""
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual must be {x.dtype} {tuple(x.shape)}, got {residual.dtype} {tuple(residual.shape)}")
    h_and_y: tuple[torch.Tensor, torch.Tensor] = _AddRMSNorm.apply(
        x.contiguous(), residual.contiguous(), weight, eps, shift
    )
    return h_and_y


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{x.shape[-1]}] for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("RMSNorm's weight is frozen here: it must not require a gradient")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.shift = eps, shift
        return rms_norm_forward(x, weight, eps, shift)

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        return rms_norm_backward(d_y.contiguous(), x, weight, ctx.eps, ctx.shift), None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, shift: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.empty_like(x)
        y = rms_norm_forward(x, weight, eps, shift, residual=residual, sum_out=h)
        ctx.save_for_backward(h, weight)
        ctx.eps, ctx.shift = eps, shift
        return h, y

    @staticmethod
    def backward(ctx: Any, d_h: torch.Tensor, d_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        h, weight = ctx.saved_tensors
        d = rms_norm_backward(d_y.contiguous(), h, weight, ctx.eps, ctx.shift, skip=d_h.contiguous())
        return d, d, None, None, None


# ---- the two passes, for autograd functions that hold more than a norm


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    shift: float = 0.0,
    *,
    residual: torch.Tensor | None = None,
    sum_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y; with `residual`, of residual + x, which is written to `sum_out` (may be x or residual). All contiguous, but
    that x alone may be heads [B, S, N, H] out of longer rows.

    out: where y goes (may be x), else a new tensor. Its rows may lie apart, and it may be [T, H] where x is not."""
    assert (residual is None) == (sum_out is None), "residual and sum_out come together"
    for name, given in (("weight", weight), ("residual", residual), ("sum_out", sum_out)):
        assert given is None or given.is_contiguous(), f"{name} with strides {given.stride()}"
    assert residual is None or x.is_contiguous(), f"x with strides {x.stride()} beside a residual"
    out = _out(x, out)
    if on_triton(x):
        _launch_forward(x, weight, eps, shift, residual, sum_out, out)
    else:
        _plain_forward(x, weight, eps, shift, residual, sum_out, out)
    return out


def rms_norm_backward(
    d_y: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    shift: float = 0.0,
    *,
    skip: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """d_h, plus `skip` (the gradient reaching h by its other path) if given. h contiguous, or as
    `rms_norm_forward`'s x.

    d_y, skip: of h's dtype; like out they may have rows that lie apart, and be [T, H] where h is not. out: where the
    result goes (may be d_y or skip: every row is read before it is written), else a new tensor."""
    assert weight.is_contiguous(), f"weight with strides {weight.stride()}"
    out = _out(h, out)
    if on_triton(h):
        _launch_backward(d_y, h, weight, eps, shift, skip, out)
    else:
        _plain_backward(d_y, h, weight, eps, shift, skip, out)
    return out


def _out(like: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return empty_like(like)
    if out.dtype != like.dtype or out.shape[-1] != like.shape[-1] or out.numel() != like.numel() or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {like.dtype} {tuple(like.shape)} with stride 1 along its last axis, "
            f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, H], a view."""
    assert x.stride(-1) == 1, f"rows with strides {x.stride()}"
    return x.view(-1, x.shape[-1])


def _apart(x: torch.Tensor) -> tuple[int, int]:
    """(N, distance) of x whose rows lie together in groups of N, the groups as far apart as that; N 0: all together."""
    if x.is_contiguous():
        return 0, x.shape[-1]
    assert x.dim() == 4, f"rows {tuple(x.shape)} with strides {x.stride()}"
    _, sequence, heads, width = x.shape
    distance = x.stride(0) if sequence == 1 else x.stride(1)
    wanted = (sequence * distance, distance, width, 1)
    assert all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), wanted, strict=True)), f"strides {x.stride()}"
    return heads, distance


# ---- meaning, and the path on a CPU


def _plain_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    shift: float,
    residual: torch.Tensor | None,
    sum_out: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if residual is not None:
        x = torch.add(residual, x, out=sum_out)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(normed.mul_(weight.to(wide.dtype) + shift).view(out.shape))


def _plain_backward(
    d_y: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    shift: float,
    skip: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n = wide * r
    g = d_y.to(wide.dtype).view(wide.shape) * (weight.to(wide.dtype) + shift)
    d_h = (g - n * (g * n).mean(-1, keepdim=True)).mul_(r)
    out.copy_((d_h if skip is None else d_h.add_(skip.view(d_h.shape))).view(out.shape))


# ---- Triton: a program holds ROWS whole rows


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, sum_ptr, weight_ptr, out_ptr, n_rows, x_stride, out_stride, eps, shift,
    H: tl.constexpr, HEADS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * H + column[None, :]
    live = (row < n_rows)[:, None] & (column < H)[None, :]
    x_at = at  # H is known when this is compiled, and with it how rows are aligned
    if HEADS:
        x_at = (row // HEADS * x_stride + row % HEADS * H)[:, None] + column[None, :]
    x = tl.load(x_ptr + x_at, mask=live, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        h = x.to(out_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, h, mask=live)
        x = h.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32) + shift
    r = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)
    y = x * r[:, None] * weight[None, :]
    tl.store(out_ptr + row[:, None] * out_stride + column[None, :], y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _backward_kernel(
    d_y_ptr, h_ptr, weight_ptr, skip_ptr, out_ptr, n_rows, h_stride, d_y_stride, skip_stride, out_stride, eps, shift,
    H: tl.constexpr, HEADS: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * H + column[None, :]
    live = (row < n_rows)[:, None] & (column < H)[None, :]
    h_at = at
    if HEADS:
        h_at = (row // HEADS * h_stride + row % HEADS * H)[:, None] + column[None, :]
    h = tl.load(h_ptr + h_at, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32) + shift
    d_y = tl.load(d_y_ptr + row[:, None] * d_y_stride + column[None, :], mask=live, other=0.0)
    g = d_y.to(tl.float32) * weight[None, :]
    r = tl.rsqrt(tl.sum(h * h, axis=1) / H + eps)[:, None]
    n = h * r
    d_h = r * (g - n * (tl.sum(g * n, axis=1) / H)[:, None])
    if SKIP:
        skip = tl.load(skip_ptr + row[:, None] * skip_stride + column[None, :], mask=live, other=0.0)
        d_h += skip.to(tl.float32)
    tl.store(out_ptr + row[:, None] * out_stride + column[None, :], d_h.to(out_ptr.dtype.element_ty), mask=live)


@cost_of(_forward_kernel)
def _forward_cost(x: torch.Tensor, *_: Any, RESIDUAL: bool, **__: Any) -> Cost:
    return Cost(bytes=(4 if RESIDUAL else 2) * x.nbytes)


@cost_of(_backward_kernel)
def _backward_cost(d_y: torch.Tensor, *_: Any, SKIP: bool, **__: Any) -> Cost:
    return Cost(bytes=(4 if SKIP else 3) * d_y.nbytes)


_TILE = 2048  # numbers a program holds at least


def _grid(x: torch.Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    H = x.shape[-1]
    n_rows = x.numel() // H
    columns = next_power_of_2(H)
    rows = max(1, _TILE // columns)
    warps = 4 if rows * columns < 4096 else 8 if rows * columns < 16384 else 16
    return (cdiv(n_rows, rows),), n_rows, {"H": H, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def _launch_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    shift: float,
    residual: torch.Tensor | None,
    sum_out: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    grid, n_rows, tiling = _grid(x)
    if n_rows:
        given = residual is not None
        heads, stride = _apart(x)
        launch(
            _forward_kernel, grid,
            x, residual if given else x, sum_out if given else x, weight, out, n_rows, stride, _rows(out).stride(0),
            eps, shift, HEADS=heads, RESIDUAL=given, **tiling,
        )  # fmt: skip


def _launch_backward(
    d_y: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    shift: float,
    skip: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    grid, n_rows, tiling = _grid(h)
    if n_rows:
        heads, stride = _apart(h)
        skipped = d_y if skip is None else skip
        launch(
            _backward_kernel, grid,
            d_y, h, weight, skipped, out, n_rows, stride, _rows(d_y).stride(0), _rows(skipped).stride(0),
            _rows(out).stride(0), eps, shift, HEADS=heads, SKIP=skip is not None, **tiling,
        )  # fmt: skip
