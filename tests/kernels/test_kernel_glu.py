"""SwiGLU and both GEGLUs against PyTorch's own activations and float64; the in-place backward and its three results."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fsdp_qlora.kernels.glu import ACTIVATIONS, glu, glu_backward_, glu_forward
from tests.support.tiers import some_slow
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

PLAIN = {"silu": F.silu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"), "gelu": F.gelu}
SHAPES = [(1, 64), (63, 100), (2, 3, 48), (2, 1500)]


def plain(gate, up, activation):
    """In float32 with one rounding at the end, as the best plain form has it."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (PLAIN[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)


def inputs(shape, dtype, device):
    make = torch.Generator().manual_seed(shape[-1])
    gate, up, d_h = (torch.randn(shape, generator=make).to(device, dtype) for _ in range(3))
    return gate * 3, up, d_h


def check(shape, dtype, device, activation):
    def run(op, gate, up, d_h):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = op(gate, up, activation)
        return h, *torch.autograd.grad(h, [gate, up], d_h)

    tensors = inputs(shape, dtype, device)
    results = zip(
        ("h", "d_gate", "d_up"),
        run(glu, *tensors),
        run(plain, *tensors),
        run(plain, *(t.double() for t in tensors)),
        strict=True,
    )
    for name, *values in results:
        assert_as_good_as_plain(*values, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_form(shape, dtype, activation):
    check(shape, dtype, "cpu", activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, activation, triton_device):
    check(shape, dtype, triton_device, activation)


@pytest.mark.parametrize("activation", some_slow(ACTIVATIONS, 3))
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_halves_of_one_product_in_place(form, activation, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    gate, up, d_h = inputs((63, 100), torch.float32, device)
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = glu(*leaves, activation)
    d_gate, d_up = torch.autograd.grad(h, leaves, d_h)

    fused = torch.cat([gate, up], dim=1)
    # Not bit for bit: PyTorch on a CPU rounds a strided exp otherwise than a contiguous one.
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(glu_forward(fused[:, :100], fused[:, 100:], activation), h)
    again = d_h.clone()
    glu_backward_(again, fused[:, :100], fused[:, 100:], activation)
    close(fused, torch.cat([d_gate, d_up], dim=1))
    close(again, h)

    wide = torch.full((63, 108), 7.0, device=device)
    close(glu_forward(gate, up, activation, out=wide[:, :100]), h)
    assert (wide[:, 100:] == 7).all(), "wrote beside the rows"

    assert glu_forward(gate, up, activation, out=gate) is gate
    close(gate, h)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out_values_stay_finite(activation, triton_device):
    gate = torch.tensor([[-100.0, -30.0, 30.0, 100.0, 0.0]], device=triton_device)
    up = torch.ones_like(gate)
    h = glu_forward(gate, up, activation)
    torch.testing.assert_close(h, gate.clamp(min=0))
    glu_backward_(up.clone(), gate, up, activation)
    torch.testing.assert_close(gate, torch.tensor([[0, 0, 1.0, 1.0, 0.5]], device=triton_device))


def test_wrong_inputs_are_refused():
    gate = torch.randn(3, 8)
    with pytest.raises(ValueError, match="one of silu, gelu_tanh, gelu"):
        glu(gate, gate, "relu")
    with pytest.raises(ValueError, match="up must be"):
        glu(gate, gate[:, :4], "silu")
    with pytest.raises(ValueError, match="d_h must be"):
        glu_backward_(gate.bfloat16(), gate, gate, "silu")
