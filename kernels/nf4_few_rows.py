"""A few rows times an NF4 matrix, the codes read once and never written out as numbers: y = x W^T + b + xa B^T.

With one row a matrix product is a pass over the matrix: 4-bit codes are a quarter of what a dequantized copy is, and
writing that and reading it back would move nine times as much. Tensor cores multiply 8 rows in the time of one, so the
pass costs about the same for all few rows; the caller knows up to how many it pays.

A program decodes a tile of OUTPUTS x BLOCKS quantization blocks into registers, rounded to x's dtype exactly as
`dequantize_nf4` rounds, and multiplies it from the left: W is the wide operand, x^T the narrow one. A byte holds two
neighbours, so the tile becomes two matrices, of even and of odd features, and x is taken apart likewise: no shuffle of
the decoded numbers. In: a tile's codes, 2 KiB, ahead of use by asynchronous copies. Tried on paper and left: plain
multiply-adds need x in float32 once more for every output (8 bytes of x for a byte of codes, from the cache), which
took 9.9 ms a step of 8B where the codes take 1.3.

A matrix of 4096 outputs has 64 tiles of them, a card 100 multiprocessors and more: so a row's blocks are divided among
SPLITS programs. The last to finish sums their parts, in their order, so the same call gives the same bits.

M rows, I in features, O out features, R the adapter's columns.
"""

import functools
from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty, launch, next_power_of_2, on_triton, tl, triton
from fsdp_qlora.kernels.nf4 import scale_parts, tables_of
from fsdp_qlora.kernels.nf4_format import BLOCK, Scales, check_stored

MOST_ROWS = 64  # of one program: its x^T and sums stay in registers
OUTPUTS, BLOCKS = 64, 2  # of a program's tile: out features, and blocks of each
PROGRAMS = 4  # for each multiprocessor: enough loads in flight to keep the memory busy
FEWEST_STEPS = 4  # of a program, below which starting it costs more than it brings
MOST_RANK = 128  # columns of the adapter in one product: 512 take 104 KiB of shared memory, a gaming card has 99


def can_multiply(like: torch.Tensor, in_features: int) -> bool:
    """Tell whether `nf4_few_rows` runs on like's device, in its dtype, and takes matrices of this width.

    Tensor cores are for 16 bits. In float32 its one long sum per number is four times as far off as cuBLAS'."""
    return on_triton(like) and like.dtype.itemsize == 2 and in_features % BLOCK == 0


def nf4_few_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: Scales,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
) -> None:
    """Write the product to out [M, O], stride 1 along O, of x's dtype. Outside autograd, on one stream at a time.

    x: [M, I], contiguous. codes, absmax: of a matrix [O, I], as of `dequantize_nf4`. bias: [O]. xa, b: [M, R] (scaled
    already, stride 1 along R) and [O, R], of an adapter. Raises ValueError for what does not fit."""
    rows, width = x.shape
    outputs = out.shape[1]
    check_stored(codes, absmax, (outputs, width))
    fits = out.shape[0] == rows and out.stride(1) == 1 and out.dtype == x.dtype and x.is_contiguous()
    if width % BLOCK or not fits or (xa is None) != (b is None):
        raise ValueError(f"no product of {rows} rows of {width} (by whole blocks of {BLOCK}) into {tuple(out.shape)}")
    rank = 0 if b is None else b.shape[1]
    tables, tiles = tables_of(x.device), cdiv(outputs, OUTPUTS)
    for first in range(0, rows, MOST_ROWS):
        count = min(MOST_ROWS, rows - first)
        steps, splits = _division(tiles, cdiv(width // BLOCK, BLOCKS), x.device)
        parts = empty((splits, outputs, count), x, torch.float32) if splits > 1 else tables
        launch(
            _few_rows_kernel, (tiles, splits),
            x[first:], codes, *scale_parts(absmax, tables), tables, tables if bias is None else bias,
            tables if xa is None else xa[first:], tables if b is None else b, out[first:], parts,
            _arrivals(x.device, tiles), count, outputs, 0 if xa is None else xa.stride(0), out.stride(0),
            I=width, NESTED=isinstance(absmax, tuple), BIAS=bias is not None, R=rank,
            R_TILE=min(MOST_RANK, max(16, next_power_of_2(rank))), ROWS=max(8, next_power_of_2(count)), OUTPUTS=OUTPUTS,
            BLOCKS=BLOCKS, STEPS=steps, SPLITS=splits, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _division(tiles: int, steps: int, device: torch.device) -> tuple[int, int]:
    """Return (steps of a program, programs among which the steps of a tile are divided)."""
    wanted = cdiv(PROGRAMS * _multiprocessors(device), tiles)
    each = min(steps, max(FEWEST_STEPS, cdiv(steps, wanted)))
    return each, cdiv(steps, each)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _arrivals(device: torch.device, tiles: int) -> torch.Tensor:
    """Return int32 [tiles], zero between two launches: how many parts of a tile are done.

    Made outside a graph's capture: there the zeros would be written by its replays alone."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "the first call of a shape, captured"
    return torch.zeros(tiles, dtype=torch.int32, device=device)


@triton.jit
def _few_rows_kernel(
    x_ptr, codes_ptr,
    scale_ptr,  # float32 scales, or their uint8 indices if NESTED
    nested_ptr, offset_ptr,
    tables_ptr,  # float32 [272]: the 16 levels, then the 256-entry map
    bias_ptr, xa_ptr, b_ptr, out_ptr,
    parts_ptr,  # float32 [SPLITS, O, rows]
    arrivals_ptr,  # int32, one for each tile
    rows, O, xa_stride, out_stride,
    I: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """OUTPUTS out features of all rows, over STEPS x BLOCKS blocks of in features."""
    K: tl.constexpr = BLOCKS * 32  # bytes of a tile's row
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    row, byte, feature = tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, 2 * K)
    live, known = outputs < O, row < rows
    levels = tl.load(tables_ptr + tl.arange(0, 16))
    summed = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for step in range(STEPS):
        first = (split * STEPS + step) * BLOCKS
        at = first * 32 + byte
        code = tl.load(
            codes_ptr + outputs.to(tl.int64)[:, None] * (I // 2) + at[None, :],
            mask=live[:, None] & (at < I // 2)[None, :], other=0,
        ).to(tl.int32)  # fmt: skip
        block = first + tl.arange(0, BLOCKS)
        inside = live[:, None] & (block < I // 64)[None, :]
        place = outputs.to(tl.int64)[:, None] * (I // 64) + block[None, :]
        if NESTED:
            index = tl.load(scale_ptr + place, mask=inside, other=0).to(tl.int32)
            nested = tl.load(nested_ptr + place // 256, mask=inside, other=0.0)
            scale = tl.load(tables_ptr + 16 + index) * nested
            scale = scale + tl.load(offset_ptr)
        else:
            scale = tl.load(scale_ptr + place, mask=inside, other=0.0)
        column = first * 64 + feature
        x = tl.load(
            x_ptr + row[:, None] * I + column[None, :], mask=known[:, None] & (column < I)[None, :], other=0.0
        )  # fmt: skip
        even, odd = tl.split(tl.reshape(x, [ROWS, K, 2]))
        code = tl.reshape(code, [OUTPUTS * K])
        high = tl.reshape(tl.gather(levels, code >> 4, 0), [OUTPUTS, BLOCKS, 32]) * scale[:, :, None]
        low = tl.reshape(tl.gather(levels, code & 15, 0), [OUTPUTS, BLOCKS, 32]) * scale[:, :, None]
        high = tl.reshape(high.to(x.dtype), [OUTPUTS, K])
        low = tl.reshape(low.to(x.dtype), [OUTPUTS, K])
        summed = tl.dot(high, tl.trans(even), summed, input_precision="ieee")
        summed = tl.dot(low, tl.trans(odd), summed, input_precision="ieee")
    tile = live[:, None] & known[None, :]
    is_last = True
    if SPLITS > 1:
        at_part = outputs.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(parts_ptr + split.to(tl.int64) * O * rows + at_part, summed, mask=tile)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(arrivals_ptr + tl.program_id(0), 0)
            summed = tl.zeros([OUTPUTS, ROWS], tl.float32)
            for _ in range(SPLITS):
                summed += tl.load(parts_ptr + at_part, mask=tile, other=0.0, cache_modifier=".cg")
                at_part += O * rows
    if is_last:
        if BIAS:
            summed += tl.load(bias_ptr + outputs, mask=live, other=0.0).to(tl.float32)[:, None]
        for first_r in tl.static_range(0, R, R_TILE):
            r = first_r + tl.arange(0, R_TILE)
            b_at = outputs.to(tl.int64)[:, None] * R + r[None, :]
            b = tl.load(b_ptr + b_at, mask=live[:, None] & (r < R)[None, :], other=0.0)
            xa = tl.load(
                xa_ptr + row[None, :] * xa_stride + r[:, None], mask=known[None, :] & (r < R)[:, None], other=0.0
            )
            summed = tl.dot(b, xa, summed, input_precision="ieee")
        tl.store(out_ptr + row[None, :] * out_stride + outputs[:, None], summed.to(out_ptr.dtype.element_ty), mask=tile)


@cost_of(_few_rows_kernel)
def _cost(*args: Any, **_: Any) -> Cost:
    return Cost(bytes=sum(x.nbytes for x in args if isinstance(x, torch.Tensor)))
