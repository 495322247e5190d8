"""A few rows times an NF4 matrix, the codes read once and never written out as numbers: y = x W^T + b + xa B^T.

With one row a matrix product is a pass over the matrix: 4-bit codes are a quarter of what a dequantized copy is, and
reading that back and writing it before would be eight times as much. More rows are possible, but the arithmetic of
plain multiply-adds soon takes longer than tensor cores on a decoded matrix: the caller knows up to how many it pays.

A row of a program's tile is one quantization block, 64 numbers in 32 bytes with one scale, so a scale is found once a
block, by the operations that `dequantize_nf4` finds it by: sums of products are fused where it is said, and nowhere
else. x comes as float32 in two halves, its even and its odd features, since a byte holds two neighbours: then all
loads are contiguous. Each decoded number is rounded to x's dtype as `dequantize_nf4` rounds it; products are summed in
float32, in an accumulator that is added up over threads at the end only.

M rows, I in features, O out features, R the adapters' columns.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, launch, next_power_of_2, on_triton, tl, triton
from fsdp_qlora.kernels.nf4 import scale_parts, tables_of
from fsdp_qlora.kernels.nf4_format import BLOCK, Scales, check_stored

GROUP = 4  # rows of a program; the next group's programs find the codes in the cache
OUTPUTS, BLOCKS = 8, 8  # of a program's tile: out features, and blocks of each


def can_multiply(like: torch.Tensor, in_features: int) -> bool:
    """Tell whether `nf4_few_rows` runs on like's device, and takes matrices of this width."""
    return on_triton(like) and in_features % BLOCK == 0


def halves_of(x: torch.Tensor) -> torch.Tensor:
    """Return float32 [2, M, I / 2]: x's even features, then its odd ones."""
    return x.view(x.shape[0], -1, 2).permute(2, 0, 1).float().contiguous()


def nf4_few_rows(
    halves: torch.Tensor,
    codes: torch.Tensor,
    absmax: Scales,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
) -> None:
    """Write the product to out [M, O], stride 1 along O, of the dtype that weights are rounded to. Outside autograd.

    halves: of x, as `halves_of` gives them. codes, absmax: of a matrix [O, I], as of `dequantize_nf4`. bias: [O].
    xa, b: [M, R] (scaled already, stride 1 along R) and [O, R], of an adapter. Raises ValueError for what does not
    fit."""
    rows, width = halves.shape[1], 2 * halves.shape[2]
    outputs = out.shape[1]
    check_stored(codes, absmax, (outputs, width))
    if width % BLOCK or out.shape[0] != rows or out.stride(1) != 1 or (xa is None) != (b is None):
        raise ValueError(f"no product of {rows} rows of {width} (by whole blocks of {BLOCK}) into {tuple(out.shape)}")
    rank = 0 if b is None else b.shape[1]
    tables = tables_of(codes.device)
    launch(
        _few_rows_kernel, (cdiv(rows, GROUP), cdiv(outputs, OUTPUTS)),
        halves, codes, *scale_parts(absmax, tables), tables, tables if bias is None else bias,
        tables if xa is None else xa, tables if b is None else b, out,
        rows, outputs, 0 if xa is None else xa.stride(0), out.stride(0),
        I=width, NESTED=isinstance(absmax, tuple), BIAS=bias is not None, R=rank, R_TILE=next_power_of_2(max(1, rank)),
        GROUP=min(GROUP, next_power_of_2(rows)), OUTPUTS=OUTPUTS, BLOCKS=BLOCKS, STEPS=cdiv(width // BLOCK, BLOCKS),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _plus_row(summed, halves_ptr, row, rows, at, live, I: tl.constexpr, low, high):
    """Add the products of one row of x with the decoded tile."""
    inside = live & (row < rows)
    even = tl.load(halves_ptr + row * (I // 2) + at, mask=inside, other=0.0)
    odd = tl.load(halves_ptr + (rows + row) * (I // 2) + at, mask=inside, other=0.0)
    return tl.fma(even, high, tl.fma(odd, low, summed))


@triton.jit
def _finish(
    summed, row, rows, first, O, bias_ptr, xa_ptr, b_ptr, out_ptr, xa_stride, out_stride,
    BIAS: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add up one row's accumulator, bias and adapter, and store it."""
    outputs = first + tl.arange(0, OUTPUTS)
    live = outputs < O
    y = tl.sum(tl.reshape(summed, [OUTPUTS, BLOCKS * 32]), 1)
    if BIAS:
        y += tl.load(bias_ptr + outputs, mask=live, other=0.0).to(tl.float32)
    if R > 0:
        r = tl.arange(0, R_TILE)
        xa = tl.load(xa_ptr + row * xa_stride + r, mask=(r < R) & (row < rows), other=0.0).to(tl.float32)
        b_at = outputs.to(tl.int64)[:, None] * R + r[None, :]
        b = tl.load(b_ptr + b_at, mask=live[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
        y += tl.sum(b * xa[None, :], 1)
    tl.store(out_ptr + row * out_stride + outputs, y.to(out_ptr.dtype.element_ty), mask=live & (row < rows))


@triton.jit
def _few_rows_kernel(
    halves_ptr, codes_ptr,
    scale_ptr,  # float32 scales, or their uint8 indices if NESTED
    nested_ptr, offset_ptr,
    tables_ptr,  # float32 [272]: the 16 levels, then the 256-entry map
    bias_ptr, xa_ptr, b_ptr, out_ptr, rows, O, xa_stride, out_stride,
    I: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr,
    GROUP: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """GROUP (1, 2 or 4) rows, OUTPUTS out features."""
    row, first = tl.program_id(0) * GROUP, tl.program_id(1) * OUTPUTS
    piece = tl.arange(0, OUTPUTS * BLOCKS)
    output, in_step = first + piece // BLOCKS, piece % BLOCKS
    byte = tl.arange(0, 32)
    summed0 = tl.zeros([OUTPUTS * BLOCKS, 32], tl.float32)
    summed1, summed2, summed3 = summed0, summed0, summed0
    for step in range(STEPS):
        block = step * BLOCKS + in_step
        live = (output < O) & (block < I // 64)
        place = output.to(tl.int64) * (I // 64) + block
        inside = live[:, None] & (byte < 32)[None, :]
        code = tl.load(codes_ptr + place[:, None] * 32 + byte[None, :], mask=inside, other=0).to(tl.int32)
        if NESTED:
            index = tl.load(scale_ptr + place, mask=live, other=0).to(tl.int32)
            nested = tl.load(nested_ptr + place // 256, mask=live, other=0.0)
            scale = tl.load(tables_ptr + 16 + index) * nested + tl.load(offset_ptr)
        else:
            scale = tl.load(scale_ptr + place, mask=live, other=0.0)
        high = (tl.load(tables_ptr + (code >> 4)) * scale[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
        low = (tl.load(tables_ptr + (code & 15)) * scale[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
        at = block[:, None] * 32 + byte[None, :]
        summed0 = _plus_row(summed0, halves_ptr, row, rows, at, inside, I, low, high)
        if GROUP > 1:
            summed1 = _plus_row(summed1, halves_ptr, row + 1, rows, at, inside, I, low, high)
        if GROUP > 2:
            summed2 = _plus_row(summed2, halves_ptr, row + 2, rows, at, inside, I, low, high)
            summed3 = _plus_row(summed3, halves_ptr, row + 3, rows, at, inside, I, low, high)
    _finish(
        summed0, row, rows, first, O, bias_ptr, xa_ptr, b_ptr, out_ptr, xa_stride, out_stride,
        BIAS, R, R_TILE, OUTPUTS, BLOCKS,
    )  # fmt: skip
    if GROUP > 1:
        _finish(
            summed1, row + 1, rows, first, O, bias_ptr, xa_ptr, b_ptr, out_ptr, xa_stride, out_stride,
            BIAS, R, R_TILE, OUTPUTS, BLOCKS,
        )  # fmt: skip
    if GROUP > 2:
        _finish(
            summed2, row + 2, rows, first, O, bias_ptr, xa_ptr, b_ptr, out_ptr, xa_stride, out_stride,
            BIAS, R, R_TILE, OUTPUTS, BLOCKS,
        )  # fmt: skip
        _finish(
            summed3, row + 3, rows, first, O, bias_ptr, xa_ptr, b_ptr, out_ptr, xa_stride, out_stride,
            BIAS, R, R_TILE, OUTPUTS, BLOCKS,
        )  # fmt: skip


@cost_of(_few_rows_kernel)
def _cost(*args: Any, **_: Any) -> Cost:
    return Cost(bytes=sum(x.nbytes for x in args if isinstance(x, torch.Tensor)))
