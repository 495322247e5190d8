"""A float32 master copy beside bfloat16 working values, as the 16 bits that these lack: two bytes a value, not four.

    high = value rounded to bfloat16, to nearest, ties to even       low = bits(value) - bits(high) * 2^16

`join` gives back what `split_` was given, bit for bit, but for one case: a value in the very middle between two
bfloat16 that rounds down has a `low` of 2^15, one more than 16 bits hold, and comes back smaller by one unit in
float32's last place. `high` is exact always.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty, launch, on_triton, tl, triton

MOST = 0x7FFF
TILE = 1024


def master_bytes(working: torch.dtype) -> int:
    """Of a value's master copy beside its working copy, between updates."""
    return 2 if working == torch.bfloat16 else 4


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """float32 [N, L], new, from high [N, L] bfloat16, whose rows may lie apart, and low [N, L] int16."""
    _check(high, low)
    value = empty(high.shape, high, torch.float32)
    if on_triton(high):
        _launch(_join_kernel, value, high, low)
    else:
        bits = high.view(torch.int16).to(torch.int32) << 16
        value.view(torch.int32).copy_(bits + low)
    return value


def split_(value: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Writes high [N, L] bfloat16, whose rows may lie apart, and low [N, L] int16, from value [N, L] float32. A NaN
    stays one."""
    _check(high, low)
    assert value.dtype == torch.float32
    assert value.shape == high.shape
    assert value.is_contiguous()
    if on_triton(high):
        _launch(_split_kernel, value, high, low)
    else:
        high.copy_(value)
        rest = value.view(torch.int32).long() - (high.view(torch.int16).long() << 16)
        low.copy_(rest.clamp_(-MOST - 1, MOST))


def _check(high: torch.Tensor, low: torch.Tensor) -> None:
    assert high.dtype == torch.bfloat16
    assert low.dtype == torch.int16
    assert high.shape == low.shape
    assert high.dim() == 2
    assert high.stride(1) == 1
    assert low.is_contiguous()


def _launch(kernel: Any, value: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    rows, length = high.shape
    bits, high = value.view(torch.int32), high.view(torch.int16)
    launch(kernel, (cdiv(length, TILE), rows), bits, high, low, high.stride(0), length, TILE)


@triton.jit
def _places(stride, length, TILE: tl.constexpr):
    """(in a tensor whose rows are `stride` apart, in contiguous ones, which of them there are)."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    return row * stride + column, row * length + column, column < length


@triton.jit
def _join_kernel(value_ptr, high_ptr, low_ptr, stride, length, TILE: tl.constexpr):
    apart, at, live = _places(stride, length, TILE)
    high = tl.load(high_ptr + apart, mask=live, other=0).to(tl.int32)
    low = tl.load(low_ptr + at, mask=live, other=0).to(tl.int32)
    tl.store(value_ptr + at, (high << 16) + low, mask=live)


@triton.jit
def _split_kernel(value_ptr, high_ptr, low_ptr, stride, length, TILE: tl.constexpr):
    """In integers: bits up to 0x7f800000 of either sign are finite or infinite, above that not a number."""
    apart, at, live = _places(stride, length, TILE)
    bits = tl.load(value_ptr + at, mask=live, other=0)
    number = (bits & 0x7FFFFFFF) <= 0x7F800000
    high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    high = tl.where(number, high, 0x7FC0)
    low = tl.where(number, tl.minimum(bits - (high << 16), 0x7FFF), 0)
    tl.store(high_ptr + apart, high.to(tl.int16), mask=live)
    tl.store(low_ptr + at, low.to(tl.int16), mask=live)


@cost_of(_join_kernel, _split_kernel)
def _cost(value: torch.Tensor, high: torch.Tensor, low: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=value.nbytes + high.nbytes + low.nbytes)
