"""NF4 to floats: packed 4-bit weights become a matrix that can be multiplied, bit for bit as in bitsandbytes.

The format is in `nf4_format.py`. Equal bits matter: a checkpoint quantized elsewhere must mean the same weights here.
So the kernel is compiled without fused multiply-add, and the plain form below is its oracle.

How the kernel is laid out: a row of its tile is 4 packed bytes, which become 8 numbers, so in bf16 a thread loads 4
bytes and stores 16, both contiguous across the warp. The 16 levels are put into shared memory and fetched from there by
index (`tl.gather`): on an H200 1 to 3 % faster than a lookup through L1, and 60 % faster than a tree of selects, whose
twenty instructions a number starve the memory pipe. Loading the 4 bytes as one word is 0.5 % faster still, and would
need a second form for sizes that are odd.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.decoded import check_out, row_form
from fsdp_qlora.kernels.device import launch as launch_kernel
from fsdp_qlora.kernels.device import on_triton, tl, triton
from fsdp_qlora.kernels.dora import RowsDecoder, scale_rows_
from fsdp_qlora.kernels.nf4_format import BLOCK, LEVELS, NESTED_BLOCK, Scales, check_stored, dynamic_map

_CHUNK = 1 << 18  # numbers decoded at a time on the CPU: the float32 intermediate stays in cache (4x faster than whole)


def dequantize_nf4(
    codes: torch.Tensor,
    absmax: Scales,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The numbers behind packed NF4 codes.

    codes: uint8, ceil(n / 2) of them, n = product of `shape`. absmax: float32 [ceil(n / 64)], or for double
    quantization the triple (uint8 [ceil(n / 64)], float32 [ceil(blocks / 256)], float32 [1]). All contiguous, on one
    device; views into a larger buffer are fine. Returns `out` if given, else a new tensor. out: of `shape` and `dtype`,
    contiguous, or two-dimensional with rows that lie further apart, as the first I columns of a wider [O, I + R] do.
    dtype: bfloat16, float16 or float32. Raises ValueError for anything else.
    """
    n = check_stored(codes, absmax, shape)
    check_out(out, shape, dtype, "NF4")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    _decode(codes, absmax, out, n)
    return out


def nf4_rows(stored: Sequence[tuple[torch.Tensor, Scales]], rows: Sequence[int], width: int) -> RowsDecoder:
    """What decodes several matrices of one width into an `out` [sum of rows, width], one below the other; up to three
    in one launch. Checked and made ready here, for as long as the bytes stay where they are.

    stored: (codes, absmax) of each, rows: how many it has; these and out are as `dequantize_nf4` has them, and the
    scales of all quantized in one way. Its second argument: None, or a factor of each row of out, float32 (float64 for
    float64), with which what was rounded to out's dtype is multiplied and rounded again (`dora.scale_rows_`)."""
    sizes = [check_stored(*one, (count, width)) for one, count in zip(stored, rows, strict=True)]
    lengths, shape = list(rows), (sum(rows), width)
    together = 1 < len(stored) <= 3 and all(sizes) and len({type(absmax) for _, absmax in stored}) == 1
    launch: RowsDecoder | None = None

    def decode(out: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        nonlocal launch
        check_out(out, shape, out.dtype, "NF4")
        if together and on_triton(out):
            launch = launch or _rows_launch(stored, rows, sizes)
            launch(out, factor)
            return
        factors = [None] * len(lengths) if factor is None else factor.split(lengths)
        for (codes, absmax), n, piece, own in zip(stored, sizes, out.split(lengths), factors, strict=True):
            _decode(codes, absmax, piece, n, own)

    return decode


def _decode(codes: torch.Tensor, absmax: Scales, out: torch.Tensor, n: int, factor: torch.Tensor | None = None) -> None:
    if on_triton(codes):
        _launch(codes, absmax, out, n, factor)
        return
    if out.is_contiguous():
        _plain(codes.view(-1), _plain_scales(absmax), out.view(-1), n)
    else:  # a block of 64 may reach from one row into the next
        whole = torch.empty(n, dtype=out.dtype, device=codes.device)
        _plain(codes.view(-1), _plain_scales(absmax), whole, n)
        out.copy_(whole.view(out.shape))
    if factor is not None:
        scale_rows_(out, factor)


# ---- meaning, and the path on a CPU


@functools.cache
def _pairs() -> torch.Tensor:
    """Byte -> its two float32 levels, as one int64 [256], so that a lookup moves both at once."""
    byte = torch.arange(256)
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).view(torch.int64).view(-1)


@functools.cache
def _map(device: torch.device) -> torch.Tensor:
    return dynamic_map().to(device)


def _plain_scales(absmax: Scales) -> torch.Tensor:
    """float32 [blocks]."""
    if isinstance(absmax, torch.Tensor):
        return absmax.view(-1)
    indices, nested, offset = absmax
    blocks = indices.numel()
    spread = nested.view(-1, 1).expand(-1, NESTED_BLOCK).reshape(-1)[:blocks]
    return (_map(indices.device)[indices.view(-1).int()] * spread).add_(offset.view(()))


def _plain(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, n: int) -> None:
    pairs = _pairs().to(codes.device)
    whole = n - n % BLOCK
    for start in range(0, whole, _CHUNK):
        end = min(start + _CHUNK, whole)
        levels = pairs.index_select(0, codes[start // 2 : end // 2].int()).view(torch.float32)
        scale = scales[start // BLOCK : end // BLOCK, None]
        torch.mul(levels.view(-1, BLOCK), scale, out=out[start:end].view(-1, BLOCK))
    if whole < n:
        levels = pairs.index_select(0, codes[whole // 2 :].int()).view(torch.float32)
        torch.mul(levels[: n - whole], scales[-1], out=out[whole:])


# ---- Triton


@triton.jit
def _dequantize(
    program, codes_ptr, scale_ptr, nested_ptr, offset_ptr, tables_ptr, out_ptr, factor_ptr, n_bytes, n, out_stride,
    NESTED: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr, I: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """The piece of that number; arguments as the kernel's."""
    first_row = program.to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    byte = (row * 4)[:, None] + tl.arange(0, 4)[None, :]
    code = tl.load(codes_ptr + byte, mask=byte < n_bytes, other=0).to(tl.int32)

    block = row // 8
    live = row * 8 < n
    if NESTED:
        index = tl.load(scale_ptr + block, mask=live, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // 256, mask=live, other=0.0)
        scale = tl.load(tables_ptr + 16 + index) * nested
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(scale_ptr + block, mask=live, other=0.0)

    levels = tl.load(tables_ptr + tl.arange(0, 16))
    codes = tl.reshape(tl.join(code >> 4, code & 15), [ROWS * 8])
    numbers = tl.reshape(tl.gather(levels, codes, 0), [ROWS, 8]) * scale[:, None]
    numbers = numbers.to(out_ptr.dtype.element_ty)
    if FACTOR:
        if I % 8 == 0:  # 8 numbers are of one row of the matrix
            first = first_row // (I // 8)
            eighth = (first_row - first * (I // 8)).to(tl.int32) + tl.arange(0, ROWS)
            factor = tl.load(factor_ptr + first + eighth // (I // 8), mask=live, other=0.0)[:, None]
        else:
            number = (row * 8)[:, None] + tl.arange(0, 8)[None, :]
            factor = tl.load(factor_ptr + number // I, mask=number < n, other=0.0)
        numbers = (numbers.to(tl.float32) * factor).to(out_ptr.dtype.element_ty)
    if APART == 8:  # the 8 numbers of a thread stay together: one store of 16 bytes in bf16
        first = first_row // (I // 8)
        column = (first_row - first * (I // 8)).to(tl.int32) + tl.arange(0, ROWS)
        over = column // (I // 8)
        at = ((first + over) * out_stride + (column - over * (I // 8))) * 8
        tl.store(out_ptr + at[:, None] + tl.arange(0, 8)[None, :], numbers, mask=live[:, None])
    else:
        at = first_row * 8 + tl.arange(0, ROWS * 8)
        inside = at < n
        if APART == 1:
            at = at // I * out_stride + at % I
        tl.store(out_ptr + at, tl.reshape(numbers, [ROWS * 8]), mask=inside)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,  # float32 scales, or their uint8 indices if NESTED
    nested_ptr,
    offset_ptr,
    tables_ptr,  # float32 [272]: the 16 levels, then the 256-entry map
    out_ptr,
    factor_ptr,  # of each row of the matrix, if FACTOR
    n_bytes,
    n,
    out_stride,  # from one row of the matrix to the next: in eights if APART is 8, else in numbers
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,  # a row: 4 bytes, 8 numbers
    APART: tl.constexpr,  # 0: out is contiguous; 8: its rows lie apart, by multiples of 8; 1: by anything
    I: tl.constexpr,  # numbers in a row of the matrix, if APART or FACTOR
    FACTOR: tl.constexpr,
):
    _dequantize(
        tl.program_id(0), codes_ptr, scale_ptr, nested_ptr, offset_ptr, tables_ptr, out_ptr, factor_ptr, n_bytes, n,
        out_stride, NESTED, ROWS, APART, I, FACTOR,
    )  # fmt: skip


@triton.jit
def _dequantize_rows_kernel(
    codes0_ptr, codes1_ptr, codes2_ptr, scale0_ptr, scale1_ptr, scale2_ptr, nested0_ptr, nested1_ptr, nested2_ptr,
    offset0_ptr, offset1_ptr, offset2_ptr, tables_ptr, out0_ptr, out1_ptr, out2_ptr,
    factor0_ptr, factor1_ptr, factor2_ptr, n_bytes0, n_bytes1, n_bytes2, n0, n1, n2, second, third, out_stride,
    COUNT: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr, I: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """Two matrices or, if COUNT is 3, three. second, third: the programs with which they begin."""
    program = tl.program_id(0)
    if program < second:
        _dequantize(
            program, codes0_ptr, scale0_ptr, nested0_ptr, offset0_ptr, tables_ptr, out0_ptr, factor0_ptr, n_bytes0, n0,
            out_stride, NESTED, ROWS, APART, I, FACTOR,
        )  # fmt: skip
    else:
        if COUNT == 2 or program < third:
            _dequantize(
                program - second, codes1_ptr, scale1_ptr, nested1_ptr, offset1_ptr, tables_ptr, out1_ptr, factor1_ptr,
                n_bytes1, n1, out_stride, NESTED, ROWS, APART, I, FACTOR,
            )  # fmt: skip
        else:
            _dequantize(
                program - third, codes2_ptr, scale2_ptr, nested2_ptr, offset2_ptr, tables_ptr, out2_ptr, factor2_ptr,
                n_bytes2, n2, out_stride, NESTED, ROWS, APART, I, FACTOR,
            )  # fmt: skip


@cost_of(_dequantize_kernel)
def _cost(codes: torch.Tensor, scale: torch.Tensor, *rest: Any, **_: Any) -> Cost:
    return Cost(dequantized=codes.nbytes + scale.nbytes + rest[3].nbytes)


@cost_of(_dequantize_rows_kernel)
def _rows_cost(*args: Any, COUNT: int, **_: Any) -> Cost:
    codes, scales, outs = args[:COUNT], args[3 : 3 + COUNT], args[13 : 13 + COUNT]
    return Cost(dequantized=sum(x.nbytes for x in (*codes, *scales, *outs)))


@functools.cache
def tables_of(device: torch.device) -> torch.Tensor:
    return torch.cat([torch.tensor(LEVELS, dtype=torch.float32), dynamic_map()]).to(device)


_ROWS = 256
_WARPS = 4


def _launch(codes: torch.Tensor, absmax: Scales, out: torch.Tensor, n: int, factor: torch.Tensor | None) -> None:
    tables = tables_of(codes.device)
    n_bytes = codes.numel()
    if n_bytes:
        stride, form = row_form(out, factor)
        launch_kernel(
            _dequantize_kernel, (_programs(n_bytes),),
            codes, *scale_parts(absmax, tables), tables, out, tables if factor is None else factor, n_bytes, n, stride,
            NESTED=isinstance(absmax, tuple), ROWS=_ROWS, num_warps=_WARPS, enable_fp_fusion=False, **form,
        )  # fmt: skip


def _rows_launch(
    stored: Sequence[tuple[torch.Tensor, Scales]], rows: Sequence[int], sizes: Sequence[int]
) -> RowsDecoder:
    """The launch into an `out` with its rows' factors, all other arguments made."""
    count, tables = len(stored), tables_of(stored[0][0].device)
    absent = [count - 1] * (3 - count)  # arguments that are not read
    order = [*range(count), *absent]
    codes = [stored[i][0] for i in order]
    scale, nested, offset = zip(*(scale_parts(stored[i][1], tables) for i in order), strict=True)
    n_bytes = [c.numel() for c in codes]
    second = _programs(n_bytes[0])
    third = second + _programs(n_bytes[1])
    total = third + (_programs(n_bytes[2]) if count == 3 else 0)
    before = (*codes, *scale, *nested, *offset, tables)
    behind = (*n_bytes, *(sizes[i] for i in order), second, third)
    lengths, is_nested = list(rows), isinstance(stored[0][1], tuple)

    def launch(out: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        outs = out.split(lengths)
        factors = [tables] * count if factor is None else factor.split(lengths)
        stride, form = row_form(out, factor)
        launch_kernel(
            _dequantize_rows_kernel, (total,),
            *before, *(outs[i] for i in order), *(factors[i] for i in order), *behind, stride,
            COUNT=count, NESTED=is_nested, ROWS=_ROWS, num_warps=_WARPS, enable_fp_fusion=False, **form,
        )  # fmt: skip

    return launch


def _programs(n_bytes: int) -> int:
    return -(-n_bytes // (4 * _ROWS))


def scale_parts(absmax: Scales, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (absmax, tables, tables) if isinstance(absmax, torch.Tensor) else absmax
