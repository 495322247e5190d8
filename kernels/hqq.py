"""HQQ to floats: packed codes of 8, 4, 3, 2 or 1 bits become a matrix that can be multiplied, bit for bit as in hqq.

The format is in `hqq_format.py`. hqq subtracts and multiplies in the compute dtype, so each number is rounded twice;
the kernel does both in float32 and rounds after each, which gives the same bits: float32 has more than twice the
digits of bfloat16 and float16. The plain form below is the kernel's oracle, and hqq itself is the plain form's.

How the kernel is laid out: a row of its tile is one word of eight codes, which a thread loads as a whole and writes as
16 bytes of bf16, both contiguous across the warp. Along axis 1 eight codes share their scale and zero. Along axis 0
each number of a line has its own, so a program decodes the same piece of several lines with one load of them: read once
per line they would be twice the bytes that are written.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.decoded import check_out, row_form
from fsdp_qlora.kernels.device import cdiv, on_triton, tl, triton
from fsdp_qlora.kernels.device import launch as launch_kernel
from fsdp_qlora.kernels.dora import RowsDecoder, scale_rows_
from fsdp_qlora.kernels.hqq_format import EIGHT, Form, HqqParts, check_stored, unpack


def dequantize_hqq(
    parts: HqqParts, form: Form, shape: tuple[int, int], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the numbers behind packed HQQ codes: `out` if given, else a new tensor.

    parts: contiguous, on one device; views into a larger buffer are fine. codes and high: of `planes`. scale and zero:
    n / group each, in the dtype that hqq computes in. shape: [O, I], I a multiple of eight, and of the group along axis
    1, or O of the group along axis 0. out: of `shape` and `dtype`, contiguous, or with rows that lie further apart, as
    the first I columns of a wider [O, I + R] do. dtype: bfloat16, float16 or float32; where it is not that of scale and
    zero, their number is converted. Raises ValueError for anything else."""
    check_stored(parts, form, shape)
    check_out(out, shape, dtype, "HQQ")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=parts.codes.device)
    _decode(parts, form, out)
    return out


def hqq_rows(stored: Sequence[HqqParts], form: Form, rows: Sequence[int], width: int) -> RowsDecoder:
    """Return a function that decodes several matrices of one width into an `out` [sum of rows, width], one below the
    other; up to three in one launch. Checked and made ready here, for as long as the bytes stay where they are.

    stored: the parts of each, rows: how many it has; these and out are as `dequantize_hqq` has them. The function's
    factor: as of `nf4.nf4_rows`."""
    for parts, count in zip(stored, rows, strict=True):
        check_stored(parts, form, (count, width))
    lengths, shape = list(rows), (sum(rows), width)
    together = 1 < len(stored) <= 3 and len({parts.scale.dtype for parts in stored}) == 1
    launch: RowsDecoder | None = None

    def decode(out: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        nonlocal launch
        check_out(out, shape, out.dtype, "HQQ")
        if together and on_triton(out):
            launch = launch or _rows_launch(stored, form, rows, width)
            launch(out, factor)
            return
        factors = [None] * len(lengths) if factor is None else factor.split(lengths)
        for parts, piece, own in zip(stored, out.split(lengths), factors, strict=True):
            _decode(parts, form, piece, own)

    return decode


def _decode(parts: HqqParts, form: Form, out: torch.Tensor, factor: torch.Tensor | None = None) -> None:
    if on_triton(out):
        _launch(parts, form, out, factor)
        return
    out.copy_(_plain(parts, form).view(out.shape))
    if factor is not None:
        scale_rows_(out, factor)


# ---- meaning, and the path on a CPU


def _plain(parts: HqqParts, form: Form) -> torch.Tensor:
    """[n / group, group] along axis 1, [group, n / group] along axis 0: in the dtype of scale and zero."""
    lines = (-1, form.group) if form.axis == 1 else (form.group, -1)
    each = (-1, 1) if form.axis == 1 else (1, -1)
    codes = unpack(parts.codes, parts.high, form.bits).view(lines).to(parts.scale.dtype)
    return codes.sub_(parts.zero.view(each)).mul_(parts.scale.view(each))


# ---- Triton


@triton.jit
def _codes(codes_ptr, high_ptr, eight, live, BITS: tl.constexpr):
    """The codes of words: int32 [ROWS, 8]. eight, live: the words, and which of them there are [ROWS]."""
    place = tl.arange(0, 8)[None, :]
    if BITS == 8:
        codes = tl.load(codes_ptr + eight[:, None] * 8 + place, mask=live[:, None], other=0).to(tl.int32)
    else:
        PLANE: tl.constexpr = 2 if BITS == 3 else BITS
        words = tl.load(codes_ptr + eight, mask=live, other=0).to(tl.int32)
        codes = (words[:, None] >> (place * PLANE)) & ((1 << PLANE) - 1)
        if BITS == 3:
            high = tl.load(high_ptr + eight, mask=live, other=0).to(tl.int32)
            codes = codes | (((high[:, None] >> place) & 1) << 2)
    return codes


@triton.jit
def numbers_of(codes, scale, zero):
    """Their numbers, in the dtype of scale and zero: each step is rounded to it."""
    apart = (codes.to(tl.float32) - zero.to(tl.float32)).to(zero.dtype)
    return (apart.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)


@triton.jit
def _store(
    out_ptr, factor_ptr, numbers, first, step, live, out_stride,
    APART: tl.constexpr, I: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write [ROWS, 8]. first: the word that comes before `step` others [ROWS], in the order of the matrix."""
    numbers = numbers.to(out_ptr.dtype.element_ty)
    at = (first + step) * 8
    if APART or FACTOR:
        row = first // (I // 8)
        column = (first - row * (I // 8)).to(tl.int32) + step
        over = column // (I // 8)
        if APART:
            at = (row + over) * out_stride * APART + (column - over * (I // 8)) * 8
        if FACTOR:
            factor = tl.load(factor_ptr + row + over, mask=live, other=0.0)
            numbers = (numbers.to(tl.float32) * factor[:, None]).to(out_ptr.dtype.element_ty)
    place = tl.arange(0, 8)[None, :]
    tl.store(out_ptr + at[:, None] + place, numbers, mask=live[:, None])


@triton.jit
def _dequantize(
    program, codes_ptr, high_ptr, scale_ptr, zero_ptr, out_ptr, factor_ptr, n_words, out_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr,
    I: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """The piece of that number; arguments as the kernel's."""
    step = tl.arange(0, ROWS)
    if LINES == 0:
        first = program.to(tl.int64) * ROWS
        live = first + step < n_words
        group = (first + step) // (GROUP // 8)
        scale = tl.load(scale_ptr + group, mask=live, other=0.0)[:, None]
        zero = tl.load(zero_ptr + group, mask=live, other=0.0)[:, None]
        codes = _codes(codes_ptr, high_ptr, first + step, live, BITS)
        _store(out_ptr, factor_ptr, numbers_of(codes, scale, zero), first, step, live, out_stride, APART, I, FACTOR)
    else:
        in_line = n_words // GROUP
        pieces = tl.cdiv(in_line, ROWS)
        line = (program // pieces).to(tl.int64) * LINES
        piece = (program % pieces) * ROWS
        live = piece + step < in_line
        group = ((piece + step) * 8)[:, None] + tl.arange(0, 8)[None, :]
        scale = tl.load(scale_ptr + group, mask=live[:, None], other=0.0)
        zero = tl.load(zero_ptr + group, mask=live[:, None], other=0.0)
        for i in tl.static_range(LINES):
            first = (line + i) * in_line + piece
            codes = _codes(codes_ptr, high_ptr, first + step, live, BITS)
            _store(out_ptr, factor_ptr, numbers_of(codes, scale, zero), first, step, live, out_stride, APART, I, FACTOR)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    high_ptr,  # read if BITS is 3
    scale_ptr,
    zero_ptr,
    out_ptr,
    factor_ptr,  # of each row of the matrix, if FACTOR
    n_words,
    out_stride,  # from one row of the matrix to the next: in eights if APART is 8, else in numbers
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LINES: tl.constexpr,  # 0: groups along axis 1; else along axis 0, and lines that a program decodes a piece of
    ROWS: tl.constexpr,  # a row: one word, eight numbers
    APART: tl.constexpr,  # 0: out is contiguous; 8: its rows lie apart, by multiples of 8; 1: by anything
    I: tl.constexpr,  # numbers in a row of the matrix, if APART or FACTOR
    FACTOR: tl.constexpr,
):
    _dequantize(
        tl.program_id(0), codes_ptr, high_ptr, scale_ptr, zero_ptr, out_ptr, factor_ptr, n_words, out_stride,
        BITS, GROUP, LINES, ROWS, APART, I, FACTOR,
    )  # fmt: skip


@triton.jit
def _dequantize_rows_kernel(
    codes0_ptr, codes1_ptr, codes2_ptr, high0_ptr, high1_ptr, high2_ptr, scale0_ptr, scale1_ptr, scale2_ptr,
    zero0_ptr, zero1_ptr, zero2_ptr, out0_ptr, out1_ptr, out2_ptr, factor0_ptr, factor1_ptr, factor2_ptr,
    n_words0, n_words1, n_words2, second, third, out_stride,
    COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr,
    APART: tl.constexpr, I: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Two matrices or, if COUNT is 3, three. second, third: the programs with which they begin."""
    program = tl.program_id(0)
    if program < second:
        _dequantize(
            program, codes0_ptr, high0_ptr, scale0_ptr, zero0_ptr, out0_ptr, factor0_ptr, n_words0, out_stride,
            BITS, GROUP, LINES, ROWS, APART, I, FACTOR,
        )  # fmt: skip
    else:
        if COUNT == 2 or program < third:
            _dequantize(
                program - second, codes1_ptr, high1_ptr, scale1_ptr, zero1_ptr, out1_ptr, factor1_ptr, n_words1,
                out_stride, BITS, GROUP, LINES, ROWS, APART, I, FACTOR,
            )  # fmt: skip
        else:
            _dequantize(
                program - third, codes2_ptr, high2_ptr, scale2_ptr, zero2_ptr, out2_ptr, factor2_ptr, n_words2,
                out_stride, BITS, GROUP, LINES, ROWS, APART, I, FACTOR,
            )  # fmt: skip


@cost_of(_dequantize_kernel)
def _cost(*args: Any, BITS: int, **_: Any) -> Cost:
    codes, high, *others = args[:5]
    return Cost(dequantized=codes.nbytes + sum(x.nbytes for x in others) + (high.nbytes if BITS == 3 else 0))


@cost_of(_dequantize_rows_kernel)
def _rows_cost(*args: Any, COUNT: int, BITS: int, **_: Any) -> Cost:
    kinds = [args[at : at + COUNT] for at in range(0, 15, 3) if BITS == 3 or at != 3]
    return Cost(dequantized=sum(x.nbytes for kind in kinds for x in kind))


_WARPS = 4
_ROWS = 32 * _WARPS  # a word for each thread: of two, Triton loads them as one and carries half to other threads
_LINES = 8


def _launch(parts: HqqParts, form: Form, out: torch.Tensor, factor: torch.Tensor | None) -> None:
    n_words = out.numel() // EIGHT
    if n_words:
        stride, kind = row_form(out, factor)
        launch_kernel(
            _dequantize_kernel, (_programs(n_words, form),),
            *_pointers(parts), out, out if factor is None else factor, n_words, stride, **_tiling(form), **kind,
        )  # fmt: skip


def _rows_launch(stored: Sequence[HqqParts], form: Form, rows: Sequence[int], width: int) -> RowsDecoder:
    """The launch into an `out` with its rows' factors, all other arguments made."""
    count = len(stored)
    order = [*range(count), *[count - 1] * (3 - count)]  # the last are arguments that are not read
    pointers = zip(*(_pointers(stored[i]) for i in order), strict=True)
    before = tuple(pointer for kind in pointers for pointer in kind)
    n_words = [rows[i] * width // EIGHT for i in order]
    programs = [_programs(n, form) for n in n_words]
    second, third = programs[0], programs[0] + programs[1]
    total = third + (programs[2] if count == 3 else 0)
    lengths, tiling = list(rows), _tiling(form)

    def launch(out: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        outs = out.split(lengths)
        factors = outs if factor is None else factor.split(lengths)
        stride, kind = row_form(out, factor)
        launch_kernel(
            _dequantize_rows_kernel, (total,),
            *before, *(outs[i] for i in order), *(factors[i] for i in order), *n_words, second, third, stride,
            COUNT=count, **tiling, **kind,
        )  # fmt: skip

    return launch


def _pointers(parts: HqqParts) -> tuple[torch.Tensor, ...]:
    return parts.codes, parts.codes if parts.high is None else parts.high, parts.scale, parts.zero


def _programs(n_words: int, form: Form) -> int:
    if form.axis == 1:
        return cdiv(n_words, _ROWS)
    return cdiv(n_words // form.group, _ROWS) * (form.group // _LINES)


def _tiling(form: Form) -> dict[str, Any]:
    return {
        "BITS": form.bits, "GROUP": form.group, "LINES": 0 if form.axis == 1 else _LINES, "ROWS": _ROWS,
        "num_warps": _WARPS, "enable_fp_fusion": False,
    }  # fmt: skip
