"""Float32 in two halves: the high one is bfloat16 as PyTorch rounds, and both together are the value again."""

import pytest
import torch

from fsdp_qlora.kernels.masters import join, split_


def halves(value):
    """With a row of something else behind each row of `high`."""
    high = torch.full((len(value), 2, value.shape[1]), 7.0, dtype=torch.bfloat16, device=value.device)
    low = torch.empty_like(value, dtype=torch.int16)
    split_(value, high[:, 0], low)
    assert (high[:, 1] == 7).all()
    return high[:, 0], low


def bits(value):
    return value.view(torch.int32)


def edges(device):
    """Every float32 within two units of a tie, of a bfloat16 and of its neighbour, of either sign, to infinity."""
    high = torch.arange(0, 0x7F80, device=device, dtype=torch.int64) << 16
    near = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF], device=device)
    found = (high[:, None] + near).flatten()
    found = torch.cat([found, torch.tensor([0x7F800000], device=device)])
    return torch.stack([found, found - 2**31]).to(torch.int32).view(torch.float32)


@pytest.fixture(params=["plain", "kernel"])
def device(request):
    return "cpu" if request.param == "plain" else request.getfixturevalue("triton_device")


def test_high_is_rounded_and_both_are_the_value(device):
    drawn = torch.randn(2, 5003, generator=torch.Generator().manual_seed(0)).to(device)
    value = torch.cat([edges(device), drawn], dim=1)
    high, low = halves(value)
    assert torch.equal(high.view(torch.int16), value.to(torch.bfloat16).view(torch.int16))
    lost = bits(value).long() - bits(join(high, low)).long()
    down = (bits(value) & 0x1FFFF) == 0x8000  # a tie, and the bfloat16 below it is even
    assert torch.equal(lost, down.long())
    assert down.any()


@pytest.mark.slow
def test_what_is_joined_splits_into_the_same(device):
    high, low = halves(edges(device))
    again = halves(join(high, low))
    assert torch.equal(high.view(torch.int16), again[0].view(torch.int16))
    assert torch.equal(low, again[1])


def test_not_a_number_stays_one(device):
    value = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32, device=device)
    high, low = halves(value.view(torch.float32)[None])
    assert high.isnan().all()
    assert join(high, low).isnan().all()


def test_of_nothing(device):
    high, low = halves(torch.empty(2, 0, device=device))
    assert join(high, low).shape == (2, 0)
