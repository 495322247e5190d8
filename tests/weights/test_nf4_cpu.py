"""NF4 on a CPU is bitsandbytes' to the bit, also where a number is next to the bound between two codes."""

import math
from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from fsdp_qlora.kernels.nf4_format import BLOCK
from fsdp_qlora.weights.codecs import NF4, nf4_cpu
from tests.weights.test_encoding_in_pieces import DTYPES, bytes_of, nf4_by_bitsandbytes

BLOCKS = 600
MIDPOINTS = torch.from_numpy(nf4_cpu.MIDPOINTS)
SAME_SIZE = {4: torch.int32, 2: torch.int16}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda blocks: blocks,
    "odd": lambda blocks: blocks.view(-1)[: -BLOCK - 27],
    "less than a block": lambda blocks: blocks.view(-1)[:37],
    "from an odd place": lambda blocks: blocks.view(-1)[3:],
    "columns": lambda blocks: blocks.t(),
    "every other": lambda blocks: blocks.view(-1)[::2],
    "expanded": lambda blocks: blocks[:, :1].expand(BLOCKS, BLOCK),
    "trained": torch.nn.Parameter,
}


def adversarial(dtype: torch.dtype, seed: int) -> Tensor:
    """Return [BLOCKS, BLOCK] of numbers at most two steps of the dtype from a bound times their block's scale.

    Scales are of the dtype's whole range, below its normal numbers too. A third of the blocks is random, some are 0
    or -0."""
    drawn, info = torch.Generator().manual_seed(seed), torch.finfo(dtype)
    low, high = math.log2(info.smallest_normal) - 6, math.log2(info.max)
    exponent = torch.rand(BLOCKS, 1, generator=drawn, dtype=torch.float64) * (high - low) + low
    exponent[::3].floor_()  # scales with an exact inverse
    scale = (2**exponent).clamp(max=info.max).to(dtype)
    bounds = MIDPOINTS[torch.randint(len(MIDPOINTS), (BLOCKS, BLOCK), generator=drawn)]
    numbers = (bounds.double() * scale.double()).to(dtype)
    bits = SAME_SIZE[dtype.itemsize]
    steps = torch.randint(-2, 3, numbers.shape, generator=drawn).to(bits)
    moved = (numbers.view(bits) + steps).view(dtype)
    numbers = torch.where(moved.abs() <= scale, moved, numbers)  # not past 0, where a number's bits wrap
    numbers[1::3] = (torch.randn(BLOCKS // 3, BLOCK, generator=drawn) / 8).to(dtype) * scale[1::3]
    largest = torch.randint(BLOCK, (BLOCKS,), generator=drawn)
    sign = 1 - 2 * torch.randint(2, (BLOCKS,), generator=drawn)
    numbers[torch.arange(BLOCKS), largest] = scale[:, 0] * sign.to(dtype)
    numbers[::50], numbers[7::50] = 0.0, -0.0
    assert numbers.isfinite().all()
    return numbers


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_scales_are_bitsandbytes(layout, dtype, double_quant, monkeypatch):
    monkeypatch.setattr(nf4_cpu, "COUNTED", 1000)
    for seed in range(3):
        weight = LAYOUTS[layout](adversarial(dtype, seed))
        wanted = bytes_of(nf4_by_bitsandbytes(weight.detach(), double_quant))
        assert bytes_of(NF4(double_quant).encode(weight)) == wanted


def test_numbers_are_exactly_between_two_codes():
    """Else the test above could not tell `>` from `>=`."""
    blocks = adversarial(torch.float32, 0)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    assert torch.isin(MIDPOINTS, scaled).all()
    codes = NF4(False).encode(blocks)["codes"]
    assert len(codes.unique()) == 256


def test_every_number_of_16_bits_is_as_bitsandbytes_has_it():
    """Each bf16 beside a few scales: all of those below it, above it or equal."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for scale in (1.0, 0.3, 3e38, 1e-38):
        numbers = every[every.abs() <= scale]
        numbers = numbers[: len(numbers) // 63 * 63].view(-1, 63)
        weight = torch.cat([numbers, torch.full((len(numbers), 1), scale, dtype=torch.bfloat16)], 1)
        codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        found = NF4(False).encode(weight)
        assert torch.equal(found["codes"], codes.view(-1)), scale
        assert torch.equal(found["absmax"], state.absmax), scale
