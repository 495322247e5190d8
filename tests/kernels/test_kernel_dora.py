"""DoRA's norms, factors and sums, plain and as kernels, against their meaning in float64."""

import pytest
import torch

from fsdp_qlora.kernels.dora import (
    column_dots,
    finish_gradients,
    norm_products,
    row_factors,
    row_norms,
    scale_rows_,
)
from fsdp_qlora.kernels.glu_lora import glu_backward_dots_
from fsdp_qlora.kernels.rope import rope_, rope_tables
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

FORMS = ["plain", "triton"]
SHAPES = [(1, 8, 3), (40, 72, 8), (33, 100, 5), (130, 64, 64)]  # outputs, inputs, rank


@pytest.fixture
def device(form, request):
    return "cpu" if form == "plain" else request.getfixturevalue("triton_device")


def drawn(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_those_of_the_whole_weight(shape, dtype, device):
    """Plain PyTorch rounds W + s B A, and its norm, to the dtype, as PEFT does."""
    (rows, width, rank), scale = shape, 0.75
    weight, a, b = drawn(rows, width, dtype=dtype), drawn(rank, width, dtype=dtype), drawn(rows, rank, dtype=dtype)
    weight[-1], b[-1] = 0, 0  # as padding
    magnitude = row_norms(weight).to(dtype)
    padded = -(-rank // 8) * 8
    laid = torch.zeros(rows + padded, width + padded, dtype=dtype)
    laid[:rows, :width], laid[:rows, width : width + rank], laid[rows : rows + rank, :width] = weight, b, a
    laid[rows:, width:] = torch.nan
    laid = laid.to(device)
    products = norm_products(laid, rows, width, scale)
    norms, out = row_norms(weight).to(device), torch.empty(rows, device=device)
    row_factors(norms, magnitude.to(device), products, laid[:rows, width:], scale, out)
    assert out[-1] == 0, "a row of zeros stays one"

    def plain(weight, a, b, magnitude):
        whole = weight + scale * (b @ a)
        return (magnitude / torch.linalg.norm(whole, dim=1).to(weight.dtype))[:-1]

    if rows > 1:
        given = weight, a, b, magnitude
        truth = plain(*(x.double() for x in given))
        assert_as_good_as_plain(out.cpu()[:-1], plain(*given).float(), truth, "factor")


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_is_zero_has_factors_of_one(device):
    """So that the first step is the base's to the last bit, where magnitudes are float32."""
    weight = drawn(200, 72)
    norms = row_norms(weight).to(device)
    b = torch.zeros(200, 8, device=device)
    out = row_factors(norms, norms, drawn(200, 8, device=device), b, 2.0, torch.empty_like(norms))
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (70, 130), (515, 40), (4200, 8)], ids=str)
def test_column_dots(shape, bias, dtype, device):
    d_y, y = (drawn(shape[0], shape[1] + 3, dtype=dtype, device=device, seed=i)[:, : shape[1]] for i in range(2))
    b = drawn(shape[1], dtype=dtype, device=device, seed=2) if bias else None
    ours = column_dots(d_y, y, b).sum(0)

    def plain(d_y, y, b):
        return (d_y * (y if b is None else y - b)).sum(0)

    truth = plain(d_y.double(), y.double(), None if b is None else b.double())
    assert_as_good_as_plain(ours, plain(d_y, y, b).float(), truth, "dots")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pieces", [1, 3])
def test_gradients_are_finished(pieces, device):
    rows, rank = 37, 5
    dots = drawn(pieces, rows + 4, device=device)[:, 2 : rows + 2]
    factor, magnitude, d_b = (drawn(*s, device=device, seed=9) for s in ((rows,), (rows,), (rows, rank)))
    magnitude[3] = 0
    before = d_b.clone()
    d_m = finish_gradients(dots, factor, magnitude, d_b)
    assert d_m[3] == 0
    wanted = dots.double().sum(0) / magnitude.double()
    wanted[3] = 0
    torch.testing.assert_close(d_m.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_b, before * factor[:, None])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_rows_are_scaled_in_place_and_nothing_beside_them(dtype, device):
    wide = drawn(21, 1100, dtype=dtype, device=device)
    before, factor = wide.clone(), drawn(21, device=device)
    scale_rows_(wide[:, :1030], factor)
    assert torch.equal(wide[:, 1030:], before[:, 1030:])
    wanted = before[:, :1030].double() * factor.double()[:, None]
    ulp = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 and form_is_interpreted(device) else 0.5)
    assert ((wide[:, :1030].double() - wanted).abs() <= 1.01 * ulp * wanted.abs()).all()


def form_is_interpreted(device) -> bool:
    """Whether it may be Triton's interpreter, which truncates float32 to bfloat16."""
    return torch.device(device).type == "cpu"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_middle_gives_dots_and_the_inner_activations(bias, device):
    tokens, width = 45, 100
    d_h, gate_up = drawn(tokens, width, device=device), drawn(tokens, 2 * width + 8, device=device)
    b = drawn(2 * width, device=device, seed=4) if bias else None
    gate, up = gate_up[:, :width], gate_up[:, width : 2 * width]
    y = gate_up[:, : 2 * width].double()
    leaf = y.clone().requires_grad_()
    h = torch.nn.functional.silu(leaf[:, :width]) * leaf[:, width:]
    h.backward(d_h.double())
    wanted = (leaf.grad * (y if b is None else y - b.double())).sum(0)
    dots = torch.full((1, 2 * width), torch.nan, device=device)
    glu_backward_dots_(d_h, gate, up, "silu", dots, b)
    torch.testing.assert_close(dots[0].double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(d_h.double(), h.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate_up[:, : 2 * width].double(), leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_rotation_is_undone_whatever_its_scaling(device):
    cos, sin = (t.to(device) for t in rope_tables(torch.tensor([1.0, 0.1, 0.01]), 9, scaling=1.3))
    q, k = drawn(2, 9, 4, 8, device=device), drawn(2, 9, 1, 8, device=device)
    before = q.clone(), k.clone()
    rope_(q, k, cos, sin)
    assert (q - before[0]).abs().max() > 0.1
    rope_(q, k, cos, sin, inverse=True)
    torch.testing.assert_close((q, k), before, rtol=1e-5, atol=1e-6)
