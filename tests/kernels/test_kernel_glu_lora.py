"""The gated middle's backward with its adapters' gradients in one pass, against plain PyTorch and float64."""

import pytest
import torch

from fsdp_qlora.kernels.glu import ACTIVATIONS, glu
from fsdp_qlora.kernels.glu_lora import glu_backward_lora_
from tests.support.tiers import some_slow
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

# tokens, I, ranks of gate, up, down (0: no adapter)
SHAPES = [(1, 64, (4, 4, 4)), (63, 100, (3, 3, 8)), (70, 130, (64, 64, 64)), (0, 80, (4, 4, 4))]
SHAPES += [(33, 48, (0, 5, 0)), (65, 96, (0, 0, 7))]


def check(shape, dtype, device, activation):
    tokens, width, ranks = shape
    make = torch.Generator().manual_seed(width)

    def draw(*size):
        return torch.randn(size, generator=make).to(device, dtype)

    gate_up, d_h = draw(tokens, 2 * width + 8), draw(tokens, width)
    skinny = [draw(tokens, rank + 3)[:, :rank] if rank else None for rank in ranks]
    gate, up = gate_up[:, :width], gate_up[:, width : 2 * width]

    def plain(gate, up, d_h, skinny):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = glu(gate, up, activation)
        d_gate, d_up = torch.autograd.grad(h, (gate, up), d_h)
        pairs = [(d_gate, skinny[0]), (d_up, skinny[1])]
        d_bs = [None if xs is None else d.t() @ xs for d, xs in pairs]
        return [d_gate, d_up, *d_bs, None if skinny[2] is None else skinny[2].t() @ h.detach()]

    theirs = plain(gate, up, d_h, skinny)
    truth = plain(gate.double(), up.double(), d_h.double(), [None if s is None else s.double() for s in skinny])
    beside = gate_up[:, 2 * width :].clone()
    out = [None if x is None else x.new_empty(width, x.shape[1]) for x in skinny]
    out[2] = None if skinny[2] is None else skinny[2].new_empty(ranks[2], width)
    pairs = [None if x is None else (x, d) for x, d in zip(skinny, out, strict=True)]
    glu_backward_lora_(d_h, gate, up, activation, *pairs)
    ours = [gate, up, *out]
    for name, *values in zip(("d_gate", "d_up", "d_b gate", "d_b up", "d_a down"), ours, theirs, truth, strict=True):
        if values[2] is None:
            assert values[0] is None, name
        else:
            assert_as_good_as_plain(*values, name)
    assert torch.equal(gate_up[:, 2 * width :], beside), "wrote beside its place"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_form(shape, dtype, activation):
    check(shape, dtype, "cpu", activation)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", some_slow(SHAPES, 4), ids=str)
def test_kernel(shape, dtype, triton_device):
    check(shape, dtype, triton_device, "silu")
    check(shape, dtype, triton_device, "gelu_tanh")
