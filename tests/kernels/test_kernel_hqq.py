"""HQQ's kernel against its plain form, bit for bit: all widths, groups and axes, whole and as part of a wider matrix.

That the plain form is hqq's own numbers is shown in tests/weights/test_hqq.py."""

import pytest
import torch
from torch import Tensor

from fsdp_qlora.kernels.hqq import dequantize_hqq, hqq_rows
from fsdp_qlora.kernels.hqq_format import BITS, Form, HqqParts, pack, planes, unfit, unpack
from tests.support.tiers import some_slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tiles of 1024 numbers and a part of one, lines of more and of less than a tile; one row of words.
SHAPES = [(64, 200), (128, 8)]


def fitting(form: Form, shape: tuple[int, int]) -> tuple[int, int]:
    """A shape alike that has groups of that form: the ends are swapped where only that one fits."""
    return shape if not unfit(form, shape) else shape[::-1]


def parts_of(form: Form, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> HqqParts:
    """Random codes, all values included, as they lie in a block's frozen bytes: rubbish around them."""
    n = shape[0] * shape[1]
    draw = torch.Generator().manual_seed(n + form.bits)
    codes = torch.randint(2**form.bits, (n,), generator=draw)
    codes[: 2**form.bits] = torch.arange(2**form.bits)[:n]
    # Zeros beyond the codes' range and between two of them, as hqq's optimizer makes them.
    zero = torch.randn(n // form.group, generator=draw) * 2 ** (form.bits - 1)
    scale = torch.randn(n // form.group, generator=draw) * 0.02
    found = pack(codes, form.bits) | {"scale": scale.to(dtype), "zero": zero.to(dtype)}
    buffer, at, views = torch.full((1 << 19,), 255, dtype=torch.uint8, device=device), 16, {}
    for name, part in found.items():
        raw = part.view(torch.uint8)
        views[name] = buffer[at : at + raw.numel()].copy_(raw).view(part.dtype)
        at += -(-raw.numel() // 16) * 16 + 16
    return HqqParts(views["codes"], views.get("high"), views["scale"], views["zero"])


def cut(x: Tensor) -> Tensor:
    """float32 rounded to bfloat16 as Triton's interpreter does it, which drops the low bits."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)


def stated(parts: HqqParts, form: Form, shape: tuple[int, int], interpreted: bool) -> Tensor:
    """The stated meaning, number by number, in the dtype of scale and zero."""
    number = torch.arange(shape[0] * shape[1])
    codes = unpack(parts.codes, parts.high, form.bits).cpu()
    group = number // form.group if form.axis == 1 else number % (number.numel() // form.group)
    zero, scale = parts.zero.cpu()[group], parts.scale.cpu()[group]
    if interpreted and scale.dtype == torch.bfloat16:
        return cut(cut(codes.float() - zero.float()) * scale.float()).bfloat16().view(shape)
    return ((codes.to(zero.dtype) - zero) * scale).view(shape)


@pytest.mark.parametrize("bits", BITS)
def test_codes_take_their_bits_and_come_back(bits):
    codes = torch.randint(2**bits, (4, 200), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in packed.items()} == planes(bits, 800)
    assert sum(part.nbytes for part in packed.values()) == 800 * bits / 8
    back = unpack(packed["codes"], packed.get("high"), bits)
    assert torch.equal(back.to(torch.uint8), codes.view(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", some_slow([8, 64], 2))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_has_the_plain_forms_bits(bits, axis, group, dtype, triton_device):
    form = Form(bits, group, axis)
    for shape in (fitting(form, shape) for shape in SHAPES):
        parts = parts_of(form, shape, dtype, triton_device)
        out = torch.full(shape, float("nan"), dtype=dtype, device=triton_device)
        assert dequantize_hqq(parts, form, shape, dtype, out) is out
        truth = stated(parts, form, shape, interpreted=triton_device.type == "cpu")
        assert truth.abs().max() > 0
        assert torch.equal(out.cpu(), truth), shape


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_the_plain_form_is_the_stated_meaning(bits, axis):
    form, shape = Form(bits, 64, axis), (128, 192)
    for dtype in DTYPES:
        parts = parts_of(form, shape, dtype)
        exact = dequantize_hqq(parts, form, shape, dtype)
        assert torch.equal(exact, stated(parts, form, shape, interpreted=False))
        for other in DTYPES:
            assert torch.equal(dequantize_hqq(parts, form, shape, other), exact.to(other))


@pytest.mark.parametrize("form_of", ["plain", "triton"])
@pytest.mark.parametrize("apart", [8, 64, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_may_be_part_of_a_wider_one(bits, axis, apart, form_of, request):
    device = "cpu" if form_of == "plain" else request.getfixturevalue("triton_device")
    form, shape = Form(bits, 32, axis), (32, 96)
    parts = parts_of(form, shape, torch.float16, device)
    wide = torch.full((shape[0], shape[1] + apart), 7.0, dtype=torch.float16, device=device)
    out = wide[:, : shape[1]]
    assert dequantize_hqq(parts, form, shape, torch.float16, out) is out
    assert torch.equal(out, dequantize_hqq(parts, form, shape, torch.float16))
    assert (wide[:, shape[1] :] == 7).all(), "wrote beside the matrix"


@pytest.mark.parametrize("form_of", ["plain", "triton"])
@pytest.mark.parametrize("rows", some_slow([(16,), (16, 32), (16, 8, 24), (24, 8, 8), (8, 16, 8, 8)], 2), ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 3])
def test_matrices_are_decoded_one_below_the_other(bits, axis, rows, form_of, request):
    device = "cpu" if form_of == "plain" else request.getfixturevalue("triton_device")
    form, width = Form(bits, 8, axis), 136
    stored = [parts_of(form, (n, width), torch.float16, device) for n in rows]
    stored = [parts._replace(scale=parts.scale * (i + 1)) for i, parts in enumerate(stored)]
    whole = torch.full((sum(rows) + 1, width + 8), 7.0, dtype=torch.float16, device=device)
    hqq_rows(stored, form, rows, width)(whole[: sum(rows), :width])
    for parts, piece in zip(stored, whole[: sum(rows), :width].split(rows), strict=True):
        assert torch.equal(piece, dequantize_hqq(parts, form, tuple(piece.shape), torch.float16))
    assert (whole[:, width:] == 7).all(), "wrote beside the matrices"
    assert (whole[sum(rows) :] == 7).all(), "wrote below them"
    together = torch.empty(sum(rows), width, dtype=torch.float16, device=device)
    hqq_rows(stored, form, rows, width)(together)
    assert torch.equal(together, whole[: sum(rows), :width])
    factor = torch.linspace(0.5, 1.7, sum(rows), device=device)
    for out in (whole[: sum(rows), :width], torch.empty_like(together)):
        hqq_rows(stored, form, rows, width)(out, factor)
        assert torch.equal(out, (together * factor[:, None]).half()), "rounded, multiplied, rounded again"
    assert (whole[:, width:] == 7).all(), "wrote beside the matrices"


def test_wrong_parts_are_refused_by_name():
    form, shape = Form(3, 64, 1), (8, 64)
    parts = parts_of(form, shape, torch.float32)
    with pytest.raises(ValueError, match=r"codes for shape .* must be 128 contiguous torch.int16"):
        dequantize_hqq(parts, form, (16, 64), torch.float32)
    with pytest.raises(ValueError, match=r"high .* got none"):
        dequantize_hqq(parts._replace(high=None), form, shape, torch.float32)
    with pytest.raises(ValueError, match=r"zero .* must be 8 contiguous torch.float32"):
        dequantize_hqq(parts._replace(zero=parts.zero.half()), form, shape, torch.float32)
    with pytest.raises(ValueError, match="its 72 inputs are no multiple of 64"):
        dequantize_hqq(parts, form, (8, 72), torch.float32)
    with pytest.raises(ValueError, match="there is no such form"):
        dequantize_hqq(parts, Form(5, 64, 1), shape, torch.float32)
    with pytest.raises(ValueError, match="out must be"):
        dequantize_hqq(parts, form, shape, torch.float32, torch.empty(64, 8))
