"""A few rows times a matrix of codes: the product with the decoded matrix, adapter and bias included."""

import pytest
import torch

from fsdp_qlora.kernels.few_rows import _arrivals
from fsdp_qlora.weights.codecs import HQQ, NF4, FewRowsCodec
from tests.support.tiers import some_slow
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

SHAPES = {
    "whole": (64, 512),
    "odd-outputs": (37, 192),
    "one-block": (5, 64),
    "divided": (16, 1088),
    "tiles": (130, 704),
}
HALVES = [dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2]
F16 = torch.float16
HQQS = [HQQ(bits, 64, 1, F16, optimize=False) for bits in (8, 4, 3, 2, 1)]
# Groups of a part of a tile's row, of less than a part of it, and of more than all of it.
GROUPS = [HQQ(4, group, 1, F16, optimize=False) for group in (8, 32, 128, 256)]


def assert_multiplies(codec: FewRowsCodec, shape: tuple[int, int], rows: int, dtype: torch.dtype, device) -> None:
    outputs, width = shape
    make = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(n, width, generator=make) for n in (outputs, rows))
    parts = {name: part.to(device) for name, part in codec.encode(weight).items()}
    bias, xa, b = (torch.randn(s, generator=make) for s in ((outputs,), (rows, 24), (outputs, 12)))
    x, bias, xa, b = (t.to(device, dtype) for t in (x, bias, xa, b))
    whole = torch.full((rows, outputs + 3), 7.0, dtype=dtype, device=device)
    out = whole[:, :outputs]
    assert codec.takes_few_rows(x, width)
    codec.few_rows(x, parts, out, bias, xa[:, 5:17], b)
    matrix = codec.decode(parts, (outputs, width), dtype)

    def product(kind, adapted):
        y = x.to(kind) @ matrix.to(kind).T
        return y + bias.to(kind) + xa[:, 5:17].to(kind) @ b.to(kind).T if adapted else y

    assert_as_good_as_plain(out, product(dtype, True), product(torch.float64, True), "adapted")
    assert (whole[:, outputs:] == 7).all(), "it wrote beside its output"
    bare = torch.empty(rows, outputs, dtype=dtype, device=device)
    codec.few_rows(x, parts, bare, None, None, None)
    assert_as_good_as_plain(bare, product(dtype, False), product(torch.float64, False), "bare")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("codec", [NF4(True), NF4(False)], ids=lambda codec: codec.name)
@pytest.mark.parametrize("rows", some_slow([1, 3, 8, 17, 70], 2))
@pytest.mark.parametrize("shape", some_slow(SHAPES, 2))
def test_product_is_that_of_the_dequantized_matrix(shape, rows, codec, dtype, triton_device):
    assert_multiplies(codec, SHAPES[shape], rows, dtype, triton_device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("codec", HQQS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("shape", some_slow(SHAPES, 3))
def test_every_width_of_hqq_multiplies(shape, codec, dtype, triton_device):
    for rows in (1, 9):
        assert_multiplies(codec, SHAPES[shape], rows, dtype, triton_device)


@pytest.mark.parametrize("codec", GROUPS, ids=lambda codec: codec.name)
def test_groups_of_any_size_multiply(codec, triton_device):
    assert_multiplies(codec, (37, 768), 5, F16, triton_device)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_rounded_as_the_decoder_rounds_them_where_scales_are_of_another_dtype(stored, triton_device):
    """The identity times the matrix gives its numbers: no sum hides a rounding that is missing."""
    codec = HQQ(3, 64, 1, stored, optimize=False)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    parts = {name: part.to(triton_device) for name, part in codec.encode(weight).items()}
    out = torch.empty(64, 40, dtype=F16, device=triton_device)
    codec.few_rows(torch.eye(64, dtype=F16, device=triton_device), parts, out, None, None, None)
    assert torch.equal(out.T, codec.decode(parts, (40, 64), F16))


@pytest.mark.parametrize("rank", [1, 128, 300])
def test_an_adapter_of_any_rank_is_added(rank, triton_device):
    outputs, width, rows = 70, 192, 5
    make = torch.Generator().manual_seed(rank)
    codec = NF4(True)
    parts = {name: part.to(triton_device) for name, part in codec.encode(torch.zeros(outputs, width)).items()}
    x, xa, b = (
        torch.randn(s, generator=make).to(triton_device, F16) for s in ((rows, width), (rows, rank), (outputs, rank))
    )
    out = torch.empty(rows, outputs, dtype=F16, device=triton_device)
    codec.few_rows(x, parts, out, None, xa, b)
    matrix = codec.decode(parts, (outputs, width), F16)
    plain, truth = (x.to(kind) @ matrix.to(kind).T + xa.to(kind) @ b.to(kind).T for kind in (x.dtype, torch.float64))
    assert_as_good_as_plain(out, plain, truth)


def test_an_adapter_or_a_bias_that_lies_apart_or_does_not_fit_is_refused(triton_device):
    codec, make = NF4(True), torch.Generator().manual_seed(1)
    parts = {name: part.to(triton_device) for name, part in codec.encode(torch.randn(8, 64, generator=make)).items()}
    x, xa, b, bias = (torch.randn(s, generator=make).to(triton_device, F16) for s in ((3, 64), (3, 4), (8, 4), (8,)))
    out = torch.empty(3, 8, dtype=F16, device=triton_device)
    for given in (
        (bias[:7], xa, b), (bias.repeat_interleave(2)[::2], xa, b), (bias, xa, b.T.contiguous().T), (bias, xa, b[:7]),
        (bias, xa.T.contiguous().T, b), (bias, xa[:2], b), (bias, xa[:, :3], b), (bias, xa, b.float()),
        (bias, xa, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no product of 3 rows"):
            codec.few_rows(x, parts, out, *given)
    codec.few_rows(x, parts, out, bias, xa, b)


def test_counters_are_not_made_in_a_capture_where_they_would_not_be_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(AssertionError, match="captured"):
        _arrivals.__wrapped__(torch.device("cuda", 0), 3)  # what an earlier product made would be kept


def test_what_it_cannot_do_is_said(triton_device):
    like, codec = torch.empty(0, device=triton_device, dtype=F16), NF4(False)
    assert codec.takes_few_rows(like, 128)
    assert not codec.takes_few_rows(like.float(), 128)
    assert not codec.takes_few_rows(like, 96)
    assert not HQQ(4, 64, 0, F16).takes_few_rows(like, 128), "each number has a scale of its own"
    assert not HQQ(4, 64, 1, F16).takes_few_rows(like.float(), 128)
    assert not HQQ(4, 24, 1, F16).takes_few_rows(like, 96)
    for codec in (NF4(False), HQQ(4, 64, 1, F16)):
        parts = {name: part.to(triton_device) for name, part in codec.encode(torch.randn(8, 64)).items()}
        with pytest.raises(ValueError, match="no product"):
            codec.few_rows(
                torch.zeros(3, 64, device=triton_device, dtype=F16), parts,
                torch.empty(2, 8, device=triton_device, dtype=F16), None, None, None,
            )  # fmt: skip
