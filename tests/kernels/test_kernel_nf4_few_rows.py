"""A few rows times an NF4 matrix: the product with the dequantized matrix, adapter and bias included."""

import pytest
import torch

from fsdp_qlora.kernels.nf4_few_rows import _arrivals, can_multiply, nf4_few_rows
from fsdp_qlora.weights.codecs import NF4
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

SHAPES = {
    "whole": (64, 512),
    "odd-outputs": (37, 192),
    "one-block": (5, 64),
    "divided": (16, 1088),
    "tiles": (130, 704),
}


@pytest.mark.parametrize("dtype", [dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_dequantized_matrix(shape, rows, double_quant, dtype, triton_device):
    outputs, width = SHAPES[shape]
    codec = NF4(double_quant)
    make = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(n, width, generator=make) for n in (outputs, rows))
    parts = {name: part.to(triton_device) for name, part in codec.encode(weight).items()}
    bias, xa, b = (torch.randn(s, generator=make) for s in ((outputs,), (rows, 24), (outputs, 12)))
    x, bias, xa, b = (t.to(triton_device, dtype) for t in (x, bias, xa, b))
    whole = torch.full((rows, outputs + 3), 7.0, dtype=dtype, device=triton_device)
    out = whole[:, :outputs]
    assert can_multiply(x, width)
    nf4_few_rows(x, parts["codes"], codec.scales(parts), out, bias=bias, xa=xa[:, 5:17], b=b)
    matrix = codec.decode(parts, (outputs, width), dtype)

    def product(kind, adapted):
        y = x.to(kind) @ matrix.to(kind).T
        return y + bias.to(kind) + xa[:, 5:17].to(kind) @ b.to(kind).T if adapted else y

    assert_as_good_as_plain(out, product(dtype, True), product(torch.float64, True), "adapted")
    assert (whole[:, outputs:] == 7).all(), "it wrote beside its output"
    bare = torch.empty(rows, outputs, dtype=dtype, device=triton_device)
    nf4_few_rows(x, parts["codes"], codec.scales(parts), bare)
    assert_as_good_as_plain(bare, product(dtype, False), product(torch.float64, False), "bare")


@pytest.mark.parametrize("rank", [1, 128, 300])
def test_an_adapter_of_any_rank_is_added(rank, triton_device):
    outputs, width, rows = 70, 192, 5
    make = torch.Generator().manual_seed(rank)
    codec = NF4(True)
    parts = {name: part.to(triton_device) for name, part in codec.encode(torch.zeros(outputs, width)).items()}
    x, xa, b = (
        torch.randn(s, generator=make).to(triton_device, torch.float16)
        for s in ((rows, width), (rows, rank), (outputs, rank))
    )
    out = torch.empty(rows, outputs, dtype=torch.float16, device=triton_device)
    nf4_few_rows(x, parts["codes"], codec.scales(parts), out, xa=xa, b=b)
    matrix = codec.decode(parts, (outputs, width), torch.float16)
    plain, truth = (x.to(kind) @ matrix.to(kind).T + xa.to(kind) @ b.to(kind).T for kind in (x.dtype, torch.float64))
    assert_as_good_as_plain(out, plain, truth)


def test_counters_are_not_made_in_a_capture_where_they_would_not_be_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(AssertionError, match="captured"):
        _arrivals(torch.device("cuda", 0), 3)


def test_what_it_cannot_do_is_said(triton_device):
    like = torch.empty(0, device=triton_device, dtype=torch.float16)
    assert can_multiply(like, 128)
    assert not can_multiply(like.float(), 128)
    assert not can_multiply(like, 96)
    parts = NF4(False).encode(torch.randn(8, 64))
    parts = {name: part.to(triton_device) for name, part in parts.items()}
    with pytest.raises(ValueError, match="no product"):
        nf4_few_rows(
            torch.zeros(3, 64, device=triton_device), parts["codes"], parts["absmax"],
            torch.empty(2, 8, device=triton_device),
        )  # fmt: skip
