"""A few rows times an NF4 matrix, the codes read once and never written out as numbers: y = x W^T + b + xa B^T.

How the work is divided is in `few_rows.py`. A tile here is OUTPUTS x BLOCKS quantization blocks. A byte holds two
neighbours, so the tile becomes two matrices, of even and of odd features, and x is taken apart likewise: no shuffle of
the decoded numbers. In: a tile's codes, 2 KiB, ahead of use by asynchronous copies.

M rows, I in features, O out features, R the adapter's columns.
"""

import torch

from fsdp_qlora.kernels.cost import cost_of
from fsdp_qlora.kernels.device import tl, triton
from fsdp_qlora.kernels.few_rows import cost, finish, launch_few_rows, on_tensor_cores
from fsdp_qlora.kernels.nf4 import scale_parts, tables_of
from fsdp_qlora.kernels.nf4_format import BLOCK, Scales, check_stored

BLOCKS = 2  # of a row of a program's tile


def can_multiply(like: torch.Tensor, in_features: int) -> bool:
    """Tell whether `nf4_few_rows` runs on like's device, in its dtype, and takes matrices of this width."""
    return on_tensor_cores(like) and in_features % BLOCK == 0


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

    x: [M, I], contiguous. codes, absmax: of a matrix [O, I], as of `dequantize_nf4`. bias: [O], contiguous. xa, b:
    [M, R] (scaled already, stride 1 along R) and [O, R], contiguous, of an adapter and of x's dtype. Raises ValueError
    for what does not fit."""
    outputs, width = out.shape[1], x.shape[1]
    check_stored(codes, absmax, (outputs, width))
    if width % BLOCK:
        raise ValueError(f"no product of rows of {width}: blocks of {BLOCK} lie across two rows of the matrix")
    tables = tables_of(x.device)
    launch_few_rows(
        _few_rows_kernel, x, (codes, *scale_parts(absmax, tables), tables), out, BLOCKS * BLOCK, bias, xa, b,
        NESTED=isinstance(absmax, tuple), BLOCKS=BLOCKS,
    )  # fmt: skip


@triton.jit
def _few_rows_kernel(
    x_ptr, codes_ptr,
    scale_ptr,  # float32 scales, or their uint8 indices if NESTED
    nested_ptr, offset_ptr,
    tables_ptr,  # float32 [272]: the 16 levels, then the 256-entry map
    bias_ptr, xa_ptr, b_ptr, out_ptr, parts_ptr, arrivals_ptr,  # these and the next as `few_rows.finish` has them
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
    finish(
        summed, outputs, row, live, known, bias_ptr, xa_ptr, b_ptr, out_ptr, parts_ptr, arrivals_ptr, rows, O,
        xa_stride, out_stride, BIAS, R, R_TILE, SPLITS,
    )  # fmt: skip


cost_of(_few_rows_kernel)(cost)
