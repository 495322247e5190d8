"""The backward of an MLP's gated middle together with the skinny products of the adapters on either side of it.

`glu_backward_` writes d_gate, d_up and h again, [T, I], for three products to read them: d_b of gate's and up's
adapters and d_a of down's. Here these are summed up in the same pass over the data, which then is read once, and h is
not written: five passes over [T, I] instead of nine.

    d_gate = d_h * up * act'(gate)    d_b of gate = d_gate^T xs
    d_up = d_h * act(gate)            d_b of up = d_up^T xs
    h = act(gate) * up                d_a of down = d_ha^T h

xs, d_ha as in `lora_wide.py`. h, d_gate and d_up are rounded before they are multiplied, as they are for who reads
them; sums are float32. (Forward with down's x A^T in one pass is slower than two: docs/LOG.md.)

Where gate and up have magnitudes (`dora.py`), their gradients' sums of d_gate * gate and d_up * up over tokens come out
of the same pass: it is the last that has both.

T tokens, I intermediate, R a rank.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, launch, next_power_of_2, on_triton, tl, triton
from fsdp_qlora.kernels.glu import _activation, _check, glu_backward_

Pair = tuple[torch.Tensor, torch.Tensor]
BANDWIDTH = 0.75  # of copy bandwidth that the pass reaches with the adapters' sums in it
MOST_RANK = 64  # three sums of so many columns are what a multiprocessor has registers for


def glu_backward_lora_(
    d_h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    of_gate: Pair | None,
    of_up: Pair | None,
    of_down: Pair | None,
    *,
    dots: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keeps_h: bool = False,
) -> None:
    """In place: gate becomes d_gate, up becomes d_up; d_h is used up, or with keeps_h becomes h. These three [T, I].

    of_gate, of_up: (xs [T, R], where d_b [I, R] is written to); of_down: (d_ha [T, R], where d_a [R, I] is); None
    without that adapter. All of gate's dtype, R at most MOST_RANK, stride 1 along the last axis, d_b and d_a
    contiguous. dots: [1, 2 I] contiguous, written: the sums over tokens of d_gate * (gate - bias), then up's; float32,
    float64 for float64. bias: [2 I] of gate's and up's outputs, for dots; None: they have none."""
    _check(activation, gate=gate, up=up, d_h=d_h)
    pairs, width = (of_gate, of_up, of_down), gate.shape[1]
    for pair, turned in zip(pairs, (False, False, True), strict=True):
        if pair is not None:
            (x, out), rank = pair, pair[0].shape[1]
            assert x.shape[0] == gate.shape[0]
            assert x.stride(1) == 1
            assert rank <= MOST_RANK
            assert out.shape == ((rank, width) if turned else (width, rank))
            assert out.is_contiguous()
    assert dots is None or (dots.shape == (1, 2 * width) and dots.is_contiguous())
    assert bias is None or (bias.shape == (2 * width,) and bias.is_contiguous())
    if on_triton(gate):
        _launch(d_h, gate, up, activation, pairs, dots, bias, keeps_h)
        return
    before = [] if dots is None else [gate.to(dots.dtype, copy=True), up.to(dots.dtype, copy=True)]
    glu_backward_(d_h, gate, up, activation)
    if dots is not None:
        free = before if bias is None else [y - b for y, b in zip(before, bias.split(width), strict=True)]
        for d, y, dot in zip((gate, up), free, dots[0].split(width), strict=True):
            torch.sum(d * y, 0, out=dot)
    for d, pair in ((gate, of_gate), (up, of_up)):
        if pair is not None:
            torch.mm(d.t(), pair[0], out=pair[1])
    if of_down is not None:
        torch.mm(of_down[0].t(), d_h, out=of_down[1])


def glu_backward_dots_(
    d_h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dots: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """`glu_backward_`, which also writes dots [1, 2 I]: both as `glu_backward_lora_` has them."""
    glu_backward_lora_(d_h, gate, up, activation, None, None, None, dots=dots, bias=bias, keeps_h=True)


# ---- Triton: a program has some columns of I and goes down all tokens


@triton.jit
def _skinny(ptr, stride, row, rows_live, column, R: tl.constexpr):
    return tl.load(
        ptr + row[:, None] * stride + column[None, :], mask=rows_live[:, None] & (column < R)[None, :], other=0.0
    )


@triton.jit
def _glu_lora_kernel(
    d_h_ptr, gate_ptr, up_ptr, xs_gate_ptr, xs_up_ptr, d_ha_ptr, out_gate_ptr, out_up_ptr, out_down_ptr,
    dots_ptr, bias_ptr, d_h_stride, gate_stride, up_stride, xs_gate_stride, xs_up_stride, d_ha_stride, tokens,
    I: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    DOTS: tl.constexpr, BIAS: tl.constexpr, KEEPS_H: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < I
    rank = tl.arange(0, R)
    dtype = gate_ptr.dtype.element_ty
    sum_gate = tl.zeros((COLUMNS, R), tl.float32)
    sum_up = tl.zeros((COLUMNS, R), tl.float32)
    sum_down = tl.zeros((COLUMNS, R), tl.float32)
    bias_gate = tl.zeros((COLUMNS,), tl.float32)
    bias_up = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        bias_gate = tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32)
        bias_up = tl.load(bias_ptr + I + column, mask=live, other=0.0).to(tl.float32)
    dot_gate = tl.zeros((COLUMNS,), tl.float32)
    dot_up = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, tokens, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        rows_live = row < tokens
        both = rows_live[:, None] & live[None, :]
        gate_at = gate_ptr + row[:, None] * gate_stride + column[None, :]
        up_at = up_ptr + row[:, None] * up_stride + column[None, :]
        gate = tl.load(gate_at, mask=both, other=0.0).to(tl.float32)
        up = tl.load(up_at, mask=both, other=0.0).to(tl.float32)
        d_h_at = d_h_ptr + row[:, None] * d_h_stride + column[None, :]
        d_h = tl.load(d_h_at, mask=both, other=0.0).to(tl.float32)
        act, slope = _activation(gate, ACTIVATION)
        d_gate = (d_h * up * slope).to(dtype)
        d_up = (d_h * act).to(dtype)
        h = (act * up).to(dtype)
        tl.store(gate_at, d_gate, mask=both)
        tl.store(up_at, d_up, mask=both)
        if KEEPS_H:
            tl.store(d_h_at, h, mask=both)
        if DOTS:
            dot_gate += tl.sum(d_gate.to(tl.float32) * (gate - bias_gate[None, :]), 0)
            dot_up += tl.sum(d_up.to(tl.float32) * (up - bias_up[None, :]), 0)
        if R_GATE:
            xs = _skinny(xs_gate_ptr, xs_gate_stride, row, rows_live, rank, R_GATE)
            sum_gate = tl.dot(tl.trans(d_gate), xs, sum_gate, input_precision=PRECISION)
        if R_UP:
            xs = _skinny(xs_up_ptr, xs_up_stride, row, rows_live, rank, R_UP)
            sum_up = tl.dot(tl.trans(d_up), xs, sum_up, input_precision=PRECISION)
        if R_DOWN:
            d_ha = _skinny(d_ha_ptr, d_ha_stride, row, rows_live, rank, R_DOWN)
            sum_down = tl.dot(tl.trans(h), d_ha, sum_down, input_precision=PRECISION)
    if R_GATE:
        at = out_gate_ptr + column[:, None] * R_GATE + rank[None, :]
        tl.store(at, sum_gate.to(dtype), mask=live[:, None] & (rank < R_GATE)[None, :])
    if R_UP:
        at = out_up_ptr + column[:, None] * R_UP + rank[None, :]
        tl.store(at, sum_up.to(dtype), mask=live[:, None] & (rank < R_UP)[None, :])
    if R_DOWN:  # [R, I]
        at = out_down_ptr + rank[None, :] * I + column[:, None]
        tl.store(at, sum_down.to(dtype), mask=live[:, None] & (rank < R_DOWN)[None, :])
    if DOTS:
        tl.store(dots_ptr + column, dot_gate, mask=live)
        tl.store(dots_ptr + I + column, dot_up, mask=live)


COLUMNS, ROWS, WARPS, STAGES = 64, 32, 4, 3  # of 84 tilings the best over three shapes, bfloat16 on an H100
FLOAT_RANK, FLOAT_STAGES = 32, 2  # above it in float32: 3 stages take 121 KiB of shared memory, a gaming card has 99


@cost_of(_glu_lora_kernel)
def _cost(d_h: torch.Tensor, *_: Any, KEEPS_H: bool, **__: Any) -> Cost:
    return Cost(bytes=(6 if KEEPS_H else 5) * d_h.nbytes / BANDWIDTH)


def _launch(
    d_h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    pairs: tuple[Pair | None, ...],
    dots: torch.Tensor | None,
    bias: torch.Tensor | None,
    keeps_h: bool,
) -> None:
    tokens, width = gate.shape
    ranks = [0 if pair is None else pair[0].shape[1] for pair in pairs]
    given, out = zip(*((gate, gate) if pair is None else pair for pair in pairs), strict=True)
    is_large = gate.dtype == torch.float32 and max(ranks) > FLOAT_RANK
    launch(
        _glu_lora_kernel, (cdiv(width, COLUMNS),),
        d_h, gate, up, *given, *out, d_h if dots is None else dots, gate if bias is None else bias,
        d_h.stride(0), gate.stride(0), up.stride(0), *(x.stride(0) for x in given), tokens,
        I=width, R_GATE=ranks[0], R_UP=ranks[1], R_DOWN=ranks[2], R=max(16, next_power_of_2(max(ranks))),
        ROWS=ROWS, COLUMNS=COLUMNS, ACTIVATION=activation,
        PRECISION="ieee" if gate.dtype == torch.float32 else "tf32", STAGES=FLOAT_STAGES if is_large else STAGES,
        num_warps=WARPS,
        DOTS=dots is not None, BIAS=bias is not None, KEEPS_H=keeps_h,
    )  # fmt: skip
