"""Master copies are trained like float32 parameters, whatever the working copies' dtype."""

import pytest
import torch
from torch import nn

from fsdp_qlora.optim.master_weights import Masters

LENGTHS = (3, 101)  # blocks, values of each


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_updates_are_those_of_float32_parameters(dtype):
    torch.manual_seed(0)
    working = torch.zeros(3, 2, 101, dtype=dtype)
    masters, first = Masters(working[:, 1]), torch.randn(LENGTHS) * 1e-3
    for i, values in enumerate(first):
        masters.set(i, values)
    plain = [nn.Parameter(values.clone()) for values in first]
    ours = torch.optim.AdamW(masters.parameters, lr=1e-4, weight_decay=0.01)
    theirs = torch.optim.AdamW(plain, lr=1e-4, weight_decay=0.01)
    for _ in range(20):
        masters.unfold()
        for p, q in zip(masters.parameters, plain, strict=True):
            p.grad = q.grad = torch.randn(101)
        ours.step()
        theirs.step()
        for p in masters.parameters:
            p.grad = None
        masters.fold()
        assert torch.equal(working[:, 1], torch.stack(plain).detach().to(dtype))
    for i, values in enumerate(plain):
        assert torch.equal(masters.values(i), values.detach())
    assert not working[:, 0].any(), "another rank's slice"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_only_beside_bfloat16_is_there_no_float32_between_updates(dtype):
    masters = Masters(torch.zeros(LENGTHS, dtype=dtype))
    kept = 101 if dtype == torch.float16 else 0
    assert [p.numel() for p in masters.parameters] == [kept] * 3
    masters.unfold()
    assert [p.numel() for p in masters.parameters] == [101] * 3
    masters.fold()
    assert [p.numel() for p in masters.parameters] == [kept] * 3
