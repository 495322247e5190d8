"""RMSNorm and its fused residual add against plain PyTorch and float64: values, gradients, in-place forms."""

import pytest
import torch

from fsdp_qlora.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_forward
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

SHAPES = [(1, 64), (63, 100), (2, 5, 48), (3, 1000)]
EPS = 1e-5


def plain(x, weight, shift):
    """As a model in plain PyTorch has it, rounding to its dtype only at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (weight.to(wide.dtype) + shift)).to(x.dtype)


def inputs(shape, dtype, device):
    make = torch.Generator().manual_seed(shape[-1])
    x, residual, d_y, d_h = (torch.randn(shape, generator=make).to(device, dtype) for _ in range(4))
    return x * 3, residual, d_y, d_h, (1 + 0.3 * torch.randn(shape[-1], generator=make)).to(device, dtype)


def check(shape, dtype, device, shift):
    x, residual, d_y, d_h, weight = inputs(shape, dtype, device)

    def run(norm, add_norm, *tensors):
        x, residual, d_y, d_h, weight = tensors
        x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = norm(x, weight)
        (d_x,) = torch.autograd.grad(y, x, d_y)
        h, y2 = add_norm(x, residual, weight)
        d_x2, d_residual = torch.autograd.grad([h, y2], [x, residual], [d_h, d_y])
        return {"y": y, "d_x": d_x, "h": h, "y of sum": y2, "d_x of sum": d_x2, "d_residual": d_residual}

    def plain_add(x, residual, weight):
        h = residual + x
        return h, plain(h, weight, shift)

    tensors = (x, residual, d_y, d_h, weight)
    ours = run(
        lambda x, w: rms_norm(x, w, EPS, shift=shift),
        lambda x, r, w: add_rms_norm(x, r, w, EPS, shift=shift),
        *tensors,
    )
    theirs = run(lambda x, w: plain(x, w, shift), plain_add, *tensors)
    truth = run(lambda x, w: plain(x, w, shift), plain_add, *(t.double() for t in tensors))
    for name, value in ours.items():
        assert_as_good_as_plain(value, theirs[name], truth[name], name)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_form(shape, dtype, shift):
    check(shape, dtype, "cpu", shift)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, shift, triton_device):
    check(shape, dtype, triton_device, shift)


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_outputs_may_take_their_inputs_place(form, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    x, residual, d_y, d_h, weight = inputs((63, 100), torch.float32, device)
    h = residual + x
    truth = rms_norm_forward(h, weight, EPS)
    d_truth = rms_norm_backward(d_y, h, weight, EPS, skip=d_h)
    total, stream = x.clone(), residual.clone()
    rms_norm_forward(total, weight, EPS, residual=stream, sum_out=stream, out=total)
    assert torch.equal(stream, h)
    assert torch.equal(total, truth)
    for place in ("d_y", "skip"):
        tensors = {"d_y": d_y.clone(), "skip": d_h.clone()}
        out = rms_norm_backward(tensors["d_y"], h, weight, EPS, skip=tensors["skip"], out=tensors[place])
        assert out is tensors[place]
        assert torch.equal(out, d_truth)


@pytest.mark.parametrize("n_rows", [1, 63])
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_rows_may_lie_apart(form, n_rows, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    x, _, d_y, d_h, weight = inputs((n_rows, 3, 100), torch.float32, device)
    wide = torch.full((3 * n_rows, 116), 7.0, device=device)
    out = wide[:, :100]
    assert rms_norm_forward(x, weight, EPS, out=out) is out
    assert torch.equal(out.view(x.shape), rms_norm_forward(x, weight, EPS))
    rms_norm_forward(x, weight, EPS, residual=d_h, sum_out=torch.empty_like(x), out=out)
    assert torch.equal(out.view(x.shape), rms_norm_forward(d_h + x, weight, EPS))

    d_truth = rms_norm_backward(d_y, x, weight, EPS, skip=d_h)
    assert rms_norm_backward(d_y, x, weight, EPS, skip=d_h, out=out) is out
    assert torch.equal(out.view(x.shape), d_truth)
    out.copy_(d_y.view(out.shape))
    rms_norm_backward(out, x, weight, EPS, skip=d_h, out=out)
    assert torch.equal(out.view(x.shape), d_truth)
    out.copy_(d_h.view(out.shape))
    assert torch.equal(rms_norm_backward(d_y, x, weight, EPS, skip=out), d_truth)
    assert (wide[:, 100:] == 7).all(), "wrote beside the rows"


@pytest.mark.parametrize("shape", [(2, 5, 3, 100), (2, 1, 3, 100), (1, 5, 1, 48), (1, 1, 3, 48)], ids=str)
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_heads_may_be_part_of_longer_rows(form, shape, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    x, _, d_y, _, weight = inputs(shape, torch.float32, device)
    batch, sequence, heads, width = shape
    row = torch.full((batch * sequence, 16 + heads * width), 7.0, device=device)
    piece = row[:, 16:].view(shape)
    piece.copy_(x)
    y, d_x = rms_norm_forward(piece, weight, EPS), rms_norm_backward(d_y, piece, weight, EPS)
    assert y.is_contiguous()
    # Compiled, a row that need not begin on 16 numbers may be summed in another order: float32's rounding.
    exact = {"rtol": 1e-6, "atol": 1e-6} if row.is_cuda and width % 16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(y, rms_norm_forward(x, weight, EPS), **exact)
    torch.testing.assert_close(d_x, rms_norm_backward(d_y, x, weight, EPS), **exact)


@pytest.mark.parametrize("apart", ["weight", "residual", "sum_out", "x"])
def test_what_is_read_as_one_piece_is_one(apart):
    shapes = {"x": (4, 16), "residual": (4, 16), "sum_out": (4, 16), "weight": (16,)}
    given = {name: torch.ones(*shape[:-1], 2 * shape[-1])[..., :16] for name, shape in shapes.items()}
    given["weight"] = torch.ones(32)[::2]
    given = {name: x if name == apart else x.contiguous() for name, x in given.items()}
    with pytest.raises(AssertionError, match="strides"):
        rms_norm_forward(eps=1e-5, **given)


def test_a_training_weight_and_a_wrong_shape_are_refused():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="frozen"):
        rms_norm(x, torch.ones(8, requires_grad=True), EPS)
    with pytest.raises(ValueError, match=r"contiguous \[8\]"):
        rms_norm(x, torch.ones(9), EPS)
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x, torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(8), EPS)
    with pytest.raises(ValueError, match="out must be"):
        rms_norm_forward(x, torch.ones(8), EPS, out=torch.empty(8, 3).t())
