"""A few rows times an HQQ matrix, the codes read once and never written out as numbers: y = x W^T + b + xa B^T.

How the work is divided is in `few_rows.py`. A tile here is OUTPUTS x WORDS words of eight codes, decoded as
`dequantize_hqq` decodes: with two roundings to the dtype of scale and zero. Groups run along axis 1; along axis 0 each
number of a row has a scale and a zero of its own, and reading those would cost more than the codes save.

M rows, I in features, O out features, R the adapter's columns.
"""

import torch

from fsdp_qlora.kernels.cost import cost_of
from fsdp_qlora.kernels.device import next_power_of_2, tl, triton
from fsdp_qlora.kernels.few_rows import cost, finish, launch_few_rows, on_tensor_cores
from fsdp_qlora.kernels.hqq import numbers_of
from fsdp_qlora.kernels.hqq_format import EIGHT, Form, HqqParts, check_stored

WORDS = 16  # of a row of a program's tile


def can_multiply(like: torch.Tensor, form: Form) -> bool:
    """Tell whether `hqq_few_rows` runs on like's device, in its dtype, and takes codes of this form."""
    return on_tensor_cores(like) and form.axis == 1 and form.group == next_power_of_2(form.group)


def hqq_few_rows(
    x: torch.Tensor,
    parts: HqqParts,
    form: Form,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
) -> None:
    """Write the product to out [M, O], stride 1 along O, of x's dtype. Outside autograd, on one stream at a time.

    parts: of a matrix [O, I], as of `dequantize_hqq`; the other arguments as of `nf4_few_rows`. Raises ValueError for
    what does not fit."""
    check_stored(parts, form, (out.shape[1], x.shape[1]))
    if not can_multiply(x, form):
        raise ValueError(f"no product of {x.dtype} with HQQ of {form}")
    tile = WORDS * EIGHT
    launch_few_rows(
        _few_rows_kernel, x, (parts.codes, parts.codes if parts.high is None else parts.high, parts.scale, parts.zero),
        out, tile, bias, xa, b, BITS=form.bits, GROUP=form.group, GROUPS=max(1, tile // form.group), WORDS=WORDS,
    )  # fmt: skip


@triton.jit
def _few_rows_kernel(
    x_ptr, codes_ptr,
    high_ptr,  # read if BITS is 3
    scale_ptr, zero_ptr,
    bias_ptr, xa_ptr, b_ptr, out_ptr, parts_ptr, arrivals_ptr,  # these and the next as `few_rows.finish` has them
    rows, O, xa_stride, out_stride,
    I: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # of a row of the tile, at least one
    WORDS: tl.constexpr,
):  # fmt: skip
    """OUTPUTS out features of all rows, over STEPS x WORDS words of in features."""
    K: tl.constexpr = WORDS * 8
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    row, feature, place = tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, 8)[None, None, :]
    live, known = outputs < O, row < rows
    summed = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for step in range(STEPS):
        first = (split * STEPS + step) * WORDS
        column = first * 8 + feature
        if BITS == 8:
            codes = tl.load(
                codes_ptr + outputs.to(tl.int64)[:, None] * I + column[None, :],
                mask=live[:, None] & (column < I)[None, :], other=0,
            ).to(tl.int32)  # fmt: skip
        else:
            PLANE: tl.constexpr = 2 if BITS == 3 else BITS
            word = first + tl.arange(0, WORDS)
            at = outputs.to(tl.int64)[:, None] * (I // 8) + word[None, :]
            there = live[:, None] & (word < I // 8)[None, :]
            codes = tl.load(codes_ptr + at, mask=there, other=0).to(tl.int32)[:, :, None]
            codes = (codes >> (place * PLANE)) & ((1 << PLANE) - 1)
            if BITS == 3:
                high = tl.load(high_ptr + at, mask=there, other=0).to(tl.int32)[:, :, None]
                codes = codes | (((high >> place) & 1) << 2)
        group = (first * 8) // GROUP + tl.arange(0, GROUPS)
        at = outputs.to(tl.int64)[:, None] * (I // GROUP) + group[None, :]
        there = live[:, None] & (group < I // GROUP)[None, :]
        scale = tl.load(scale_ptr + at, mask=there, other=0.0)[:, :, None]
        zero = tl.load(zero_ptr + at, mask=there, other=0.0)[:, :, None]
        numbers = numbers_of(tl.reshape(codes, [OUTPUTS, GROUPS, K // GROUPS]), scale, zero)
        x = tl.load(
            x_ptr + row[:, None] * I + column[None, :], mask=known[:, None] & (column < I)[None, :], other=0.0
        )  # fmt: skip
        numbers = tl.reshape(numbers.to(x.dtype), [OUTPUTS, K])
        summed = tl.dot(numbers, tl.trans(x), summed, input_precision="ieee")
    finish(
        summed, outputs, row, live, known, bias_ptr, xa_ptr, b_ptr, out_ptr, parts_ptr, arrivals_ptr, rows, O,
        xa_stride, out_stride, BIAS, R, R_TILE, SPLITS,
    )  # fmt: skip


cost_of(_few_rows_kernel)(cost)
