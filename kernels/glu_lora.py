"""The gated middle of an MLP together with the skinny products of the adapters on either side of it.

`glu_forward` writes h, [T, I], for down's x A^T to read it; `glu_backward_` writes d_gate and d_up, and h again, for
three products to read them: d_b of gate's and up's adapters and d_a of down's. Here these products are summed up in the
same pass over the data, which then is read once, and backward never writes h: three passes over [T, I] instead of four,
and five instead of nine.

    h = act(gate) * up                xs of down = s h A^T
    d_gate = d_h * up * act'(gate)    d_b of gate = d_gate^T xs        d_up = d_h * act(gate)    d_b of up = d_up^T xs
                                      d_a of down = d_ha^T h

xs, d_ha as in `lora_wide.py`. h, d_gate and d_up are rounded before they are multiplied, as they are for who reads
them; sums are float32.

T tokens, I intermediate, R a rank.
"""

import torch

from fsdp_qlora.kernels.device import cdiv, next_power_of_2, on_triton, tl, triton
from fsdp_qlora.kernels.glu import _activation, _check, glu_backward_, glu_forward

MOST_RANK = 64  # three sums of so many columns are what a multiprocessor has registers for


def glu_forward_lora(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    a_RI: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    xs: torch.Tensor,
) -> None:
    """Writes h to out [T, I] and scale h A^T to xs [T, R]. All of one dtype with stride 1 along the last axis, R at
    most MOST_RANK. Outside autograd."""
    _check(activation, gate=gate, up=up, out=out)
    assert a_RI.shape == (xs.shape[1], gate.shape[1])
    assert xs.shape[0] == gate.shape[0]
    assert xs.shape[1] <= MOST_RANK
    if on_triton(gate):
        _launch_forward(gate, up, activation, a_RI, scale, out, xs)
    else:
        glu_forward(gate, up, activation, out=out)
        torch.addmm(xs, out, a_RI.t(), beta=0, alpha=scale, out=xs)


def glu_backward_lora_(
    d_h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    xs_gate: torch.Tensor | None,
    xs_up: torch.Tensor | None,
    d_ha: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(d_b of gate [I, R], d_b of up [I, R], d_a of down [R, I]), each of gate's dtype, or None without its adapter.

    In place: gate becomes d_gate, up becomes d_up; d_h is used up. These three [T, I], the others [T, R] of at most
    MOST_RANK and gate's dtype, all with stride 1 along the last axis."""
    _check(activation, gate=gate, up=up, d_h=d_h)
    skinny = (xs_gate, xs_up, d_ha)
    for x in skinny:
        assert x is None or (x.shape[0] == gate.shape[0] and x.stride(1) == 1 and x.shape[1] <= MOST_RANK)
    if on_triton(gate):
        return _launch(d_h, gate, up, activation, skinny)
    glu_backward_(d_h, gate, up, activation)
    d_gate, d_up = (None if xs is None else d.t() @ xs for d, xs in ((gate, xs_gate), (up, xs_up)))
    return d_gate, d_up, None if d_ha is None else d_ha.t() @ d_h


# ---- Triton: forward's programs have some tokens and go along a part of I


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, a_ptr, out_ptr, sums_ptr,
    gate_stride, up_stride, a_stride, out_stride, sums_stride, tokens, scale,
    I: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PARTS
    row = ((tl.program_id(0) // PARTS) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rows_live = row < tokens
    rank = tl.arange(0, R)
    total = tl.zeros((ROWS, R), tl.float32)
    for start in tl.range(part * PART, min(part * PART + PART, I), COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        live = column < I
        both = rows_live[:, None] & live[None, :]
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=both, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row[:, None] * up_stride + column[None, :], mask=both, other=0.0).to(tl.float32)
        act, _ = _activation(gate, ACTIVATION)
        h = (act * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * out_stride + column[None, :], h, mask=both)
        a_at = a_ptr + rank[None, :].to(tl.int64) * a_stride + column[:, None]
        a = tl.load(a_at, mask=live[:, None] & (rank < RANK)[None, :], other=0.0)
        total = tl.dot(h, a, total, input_precision=PRECISION)
    at = sums_ptr + (part.to(tl.int64) * tokens + row)[:, None] * sums_stride + rank[None, :]
    mask = rows_live[:, None] & (rank < RANK)[None, :]
    tl.store(at, (total * scale).to(sums_ptr.dtype.element_ty), mask=mask)


FORWARD_COLUMNS, FORWARD_ROWS, FORWARD_WARPS, FORWARD_STAGES = 64, 64, 4, 3
FORWARD_PROGRAMS, MOST_FORWARD_PARTS = 1024, 8  # I is cut into parts, summed by themselves, to have as many


def forward_parts(tokens: int) -> int:
    return max(1, min(MOST_FORWARD_PARTS, cdiv(FORWARD_PROGRAMS, cdiv(max(1, tokens), FORWARD_ROWS))))


def _launch_forward(gate, up, activation, a_RI, scale, out, xs):
    tokens, width = gate.shape
    parts = forward_parts(tokens)
    part = cdiv(cdiv(width, parts), FORWARD_COLUMNS) * FORWARD_COLUMNS
    sums = xs if parts == 1 else gate.new_empty((parts, *xs.shape), dtype=torch.float32)
    if gate.numel():
        _forward_kernel[(cdiv(tokens, FORWARD_ROWS) * parts,)](
            gate, up, a_RI, out, sums, gate.stride(0), up.stride(0), a_RI.stride(0), out.stride(0), sums.stride(-2),
            tokens, scale,
            I=width, RANK=xs.shape[1], R=max(16, next_power_of_2(xs.shape[1])), PART=part, PARTS=parts,
            ROWS=FORWARD_ROWS, COLUMNS=FORWARD_COLUMNS, ACTIVATION=activation, PRECISION=_precision(gate),
            STAGES=FORWARD_STAGES, num_warps=FORWARD_WARPS,
        )  # fmt: skip
    if parts > 1:
        xs.copy_(sums.sum(0))


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


# ---- backward's have some columns of I and go down a part of the tokens


@triton.jit
def _skinny(ptr, stride, row, rows_live, column, R: tl.constexpr):
    return tl.load(
        ptr + row[:, None] * stride + column[None, :], mask=rows_live[:, None] & (column < R)[None, :], other=0.0
    )


@triton.jit
def _kernel(
    d_h_ptr, gate_ptr, up_ptr, xs_gate_ptr, xs_up_ptr, d_ha_ptr, out_gate_ptr, out_up_ptr, out_down_ptr,
    d_h_stride, gate_stride, up_stride, xs_gate_stride, xs_up_stride, d_ha_stride, tokens,
    I: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr, R: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PARTS
    column = (tl.program_id(0) // PARTS) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < I
    rank = tl.arange(0, R)
    dtype = gate_ptr.dtype.element_ty
    sum_gate = tl.zeros((COLUMNS, R), tl.float32)
    sum_up = tl.zeros((COLUMNS, R), tl.float32)
    sum_down = tl.zeros((COLUMNS, R), tl.float32)
    for start in tl.range(part * PART, min(part * PART + PART, tokens), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        rows_live = row < tokens
        both = rows_live[:, None] & live[None, :]
        gate_at = gate_ptr + row[:, None] * gate_stride + column[None, :]
        up_at = up_ptr + row[:, None] * up_stride + column[None, :]
        gate = tl.load(gate_at, mask=both, other=0.0).to(tl.float32)
        up = tl.load(up_at, mask=both, other=0.0).to(tl.float32)
        d_h = tl.load(d_h_ptr + row[:, None] * d_h_stride + column[None, :], mask=both, other=0.0).to(tl.float32)
        act, slope = _activation(gate, ACTIVATION)
        d_gate = (d_h * up * slope).to(dtype)
        d_up = (d_h * act).to(dtype)
        h = (act * up).to(dtype)
        tl.store(gate_at, d_gate, mask=both)
        tl.store(up_at, d_up, mask=both)
        if R_GATE:
            xs = _skinny(xs_gate_ptr, xs_gate_stride, row, rows_live, rank, R_GATE)
            sum_gate = tl.dot(tl.trans(d_gate), xs, sum_gate, input_precision=PRECISION)
        if R_UP:
            xs = _skinny(xs_up_ptr, xs_up_stride, row, rows_live, rank, R_UP)
            sum_up = tl.dot(tl.trans(d_up), xs, sum_up, input_precision=PRECISION)
        if R_DOWN:
            d_ha = _skinny(d_ha_ptr, d_ha_stride, row, rows_live, rank, R_DOWN)
            sum_down = tl.dot(tl.trans(h), d_ha, sum_down, input_precision=PRECISION)
    place = part.to(tl.int64) * I + column
    if R_GATE:
        at = out_gate_ptr + place[:, None] * R_GATE + rank[None, :]
        tl.store(at, sum_gate.to(out_gate_ptr.dtype.element_ty), mask=live[:, None] & (rank < R_GATE)[None, :])
    if R_UP:
        at = out_up_ptr + place[:, None] * R_UP + rank[None, :]
        tl.store(at, sum_up.to(out_up_ptr.dtype.element_ty), mask=live[:, None] & (rank < R_UP)[None, :])
    if R_DOWN:  # [R, I]
        at = out_down_ptr + (part.to(tl.int64) * R_DOWN + rank)[None, :] * I + column[:, None]
        tl.store(at, sum_down.to(out_down_ptr.dtype.element_ty), mask=live[:, None] & (rank < R_DOWN)[None, :])


COLUMNS, ROWS, WARPS, STAGES = 64, 32, 4, 3
PARTS = 2  # of the tokens, summed by themselves: enough programs to occupy a GPU, whatever I is


def _launch(d_h, gate, up, activation, skinny):
    tokens, width = gate.shape
    ranks = [0 if x is None else x.shape[1] for x in skinny]
    parts = PARTS if tokens > ROWS else 1
    part = cdiv(cdiv(tokens, parts), ROWS) * ROWS
    shapes = [(width, ranks[0]), (width, ranks[1]), (ranks[2], width)]
    kind = gate.dtype if parts == 1 else torch.float32
    sums = [gate.new_empty((parts, *shape), dtype=kind) for shape in shapes]
    given = [gate if x is None else x for x in skinny]
    if gate.numel():
        _kernel[(cdiv(width, COLUMNS) * parts,)](
            d_h, gate, up, *given, *sums,
            d_h.stride(0), gate.stride(0), up.stride(0), *(x.stride(0) for x in given), tokens,
            I=width, R_GATE=ranks[0], R_UP=ranks[1], R_DOWN=ranks[2], R=max(16, next_power_of_2(max(ranks))),
            PART=part, PARTS=parts, ROWS=ROWS, COLUMNS=COLUMNS, ACTIVATION=activation,
            PRECISION=_precision(gate), STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return tuple(None if x is None else _total(s, gate.dtype) for x, s in zip(skinny, sums, strict=True))


def _total(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded once."""
    if len(parts) == 1:
        return parts[0]
    return torch.add(*parts, out=parts.new_empty(parts.shape[1:], dtype=dtype))
