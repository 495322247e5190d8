"""Codecs against bitsandbytes itself: the same bytes, and bit for bit the same numbers behind them."""

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch

from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.nf4 import dequantize_nf4
from fsdp_qlora.kernels.nf4_format import LEVELS, dynamic_map
from fsdp_qlora.weights.codecs import NF4, Plain, companions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# bitsandbytes' own AVX-512 decoder is wrong where a row is an odd multiple of 32 numbers, so there is none here.
# Whole blocks; a partial block; a partial nested block; one number; an odd number of numbers; over one CPU chunk.
SHAPES = [(64, 64), (7, 130), (257, 128), (1, 1), (3, 333), (300, 1000)]


def weight_of(shape, dtype, seed=0):
    # Outliers and an all-zero block as real weights have them.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight.view(-1)[::997] *= 30
    weight.view(-1)[64:128] = 0
    return weight.to(dtype)


def quantized(weight, double_quant):
    return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")


def test_tables_are_bitsandbytes_own():
    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_bitsandbytes_bit_for_bit(shape, dtype, double_quant):
    weight = weight_of(shape, dtype)
    codec = NF4(double_quant)
    codes, state = quantized(weight, double_quant)
    parts = codec.encode(weight)
    assert torch.equal(parts["codes"], codes.view(-1))
    scales = (state.absmax, state.state2.absmax, state.offset.view(1)) if double_quant else (state.absmax,)
    for ours, theirs in zip(list(parts.values())[1:], scales, strict=True):
        assert torch.equal(ours, theirs)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == codec.parts(shape)

    if dtype == torch.float16:  # on CPUs with float16 arithmetic bitsandbytes does not round to float32 first
        state.dtype = torch.float32
    truth = bnb.dequantize_4bit(codes, state).to(dtype)
    decoded = codec.decode(parts, shape, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, truth.view(shape))
    out = torch.full(shape, float("nan"), dtype=dtype)
    assert codec.decode(parts, shape, dtype, out) is out
    assert torch.equal(out, decoded)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_to_another_dtype_rounds_the_float32_product_once(dtype, double_quant):
    codec = NF4(double_quant)
    parts = codec.encode(weight_of((40, 96), torch.bfloat16))
    exact = codec.decode(parts, (40, 96), torch.float32)
    assert torch.equal(codec.decode(parts, (40, 96), dtype), exact.to(dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (7, 130), (3, 333), (1, 1), (257, 128)], ids=str)
def test_nf4_kernel_is_the_plain_form_bit_for_bit(shape, dtype, double_quant, triton_device):
    weight = weight_of(shape, torch.float32).to(triton_device)
    parts = NF4(double_quant).encode(weight)
    # The parts as they lie in a block's frozen bytes: views into one larger buffer, NaN and rubbish around them.
    buffer = torch.full((1 << 16,), 255, dtype=torch.uint8, device=triton_device)
    views, at = {}, 16
    for name, part in parts.items():
        raw = part.view(torch.uint8)
        views[name] = buffer[at : at + raw.numel()].copy_(raw).view(part.dtype)
        at += -(-raw.numel() // 16) * 16 + 16
    out = NF4(double_quant).decode(views, shape, dtype)
    truth = plain({name: part.cpu() for name, part in parts.items()}, double_quant, shape, dtype)
    if triton_device.type == "cpu" and dtype == torch.bfloat16:
        # Triton's interpreter truncates when it casts to bfloat16, where a GPU rounds: one unit in the last place.
        torch.testing.assert_close(out.cpu(), truth, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out.cpu(), truth)


# Rows apart by multiples of 8 numbers, of a length that is one or is not; by an odd distance; rows over a tile's end.
STRIDED = {(257, 128): 16, (7, 136): 8, (9, 130): 6, (3, 333): 1, (5, 2056): 24, (1, 64): 64}


@pytest.mark.parametrize("form", ["plain", "triton"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", STRIDED, ids=str)
def test_a_matrix_may_be_part_of_a_wider_one(shape, dtype, double_quant, form, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    codec = NF4(double_quant)
    parts = codec.encode(weight_of(shape, torch.float32).to(device))
    wide = torch.full((shape[0], shape[1] + STRIDED[shape]), 7.0, dtype=dtype, device=device)
    out = wide[:, : shape[1]]
    assert codec.decode(parts, shape, dtype, out) is out
    assert torch.equal(out, codec.decode(parts, shape, dtype))
    assert (wide[:, shape[1] :] == 7).all(), "wrote beside the matrix"
    whole = Plain(dtype).decode(Plain(dtype).encode(out), shape, dtype, out=torch.empty_like(wide)[:, : shape[1]])
    assert torch.equal(whole, out)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("width", [64, 72, 33])
@pytest.mark.parametrize("rows", [(40,), (40, 8), (40, 1, 8), (1, 40, 40), (3, 5, 2, 40)], ids=str)
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_matrices_are_decoded_one_below_the_other(form, rows, width, double_quant, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    codec = NF4(double_quant)
    weights = [weight_of((n, width), torch.float32) * (i + 1) for i, n in enumerate(rows)]
    stored = [codec.encode(weight.to(device)) for weight in weights]
    whole = torch.full((sum(rows) + 1, width + 8), 7.0, dtype=torch.float16, device=device)
    codec.rows_decoder(stored, rows, width)(whole[: sum(rows), :width])
    for parts, piece in zip(stored, whole[: sum(rows), :width].split(rows), strict=True):
        assert torch.equal(piece, codec.decode(parts, tuple(piece.shape), torch.float16))
    assert (whole[:, width:] == 7).all(), "wrote beside the matrices"
    assert (whole[sum(rows) :] == 7).all(), "wrote below them"
    together = torch.empty(sum(rows), width, dtype=torch.float16, device=device)
    codec.rows_decoder(stored, rows, width)(together)
    assert torch.equal(together, whole[: sum(rows), :width])
    factor = torch.linspace(0.5, 1.7, sum(rows), device=device)
    for out in (whole[: sum(rows), :width], torch.empty_like(together)):
        codec.rows_decoder(stored, rows, width)(out, factor)
        assert torch.equal(out, (together * factor[:, None]).half()), "rounded, multiplied, rounded again"
    assert (whole[:, width:] == 7).all(), "wrote beside the matrices"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_numbers_are_multiplied_by_their_rows_factors(dtype):
    weights, factor = [weight_of((n, 24), torch.float16) for n in (5, 9)], torch.linspace(0.5, 1.7, 14)
    stored = [Plain(torch.float16).encode(weight) for weight in weights]
    out = torch.empty(14, 24, dtype=dtype)
    Plain(torch.float16).rows_decoder(stored, (5, 9), 24)(out, factor)
    assert torch.equal(out, (torch.cat(weights) * factor[:, None]).to(dtype))


def plain(parts, double_quant, shape, dtype):
    """The stated meaning, number by number: no chunks, no table of pairs."""
    byte = parts["codes"].int()
    code = torch.stack([byte >> 4, byte & 15], 1).view(-1)
    if double_quant:
        blocks = torch.arange(parts["absmax_q"].numel())
        scale = dynamic_map()[parts["absmax_q"].int()] * parts["nested_absmax"][blocks // 256] + parts["offset"]
    else:
        scale = parts["absmax"]
    number = torch.arange(torch.Size(shape).numel())
    return (torch.tensor(LEVELS)[code[number]] * scale[number // 64]).to(dtype).view(shape)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_bitsandbytes_checkpoint_is_taken_over_bit_for_bit(double_quant):
    weight = weight_of((96, 192), torch.bfloat16)
    layer = bitsandbytes.nn.Linear4bit(192, 96, bias=False, quant_type="nf4", compress_statistics=double_quant)
    layer.load_state_dict({"weight": weight})  # into its own float32
    layer = layer.to("cpu")
    tensors = {f"model.q_proj.{name}": tensor for name, tensor in layer.state_dict().items()}
    name = "model.q_proj.weight"
    assert {name, *companions(name)} >= set(tensors)

    codec = NF4(double_quant)
    parts = codec.from_checkpoint(name, tensors, (96, 192))
    for part, expected in codec.encode(weight).items():
        assert torch.equal(parts[part], expected), part
    decoded = codec.decode(parts, (96, 192), torch.float32)
    assert torch.equal(decoded, bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state))

    with pytest.raises(UserError, match="double_quant"):
        NF4(not double_quant).from_checkpoint(name, tensors, (96, 192))
    with pytest.raises(UserError, match="shape"):
        codec.from_checkpoint(name, tensors, (96, 128))
    with pytest.raises(UserError, match="standard map"):
        codec.from_checkpoint(name, tensors | {f"{name}.quant_map": torch.zeros(16)}, (96, 192))
    for missing in tensors:
        with pytest.raises(UserError, match=missing):
            codec.from_checkpoint(name, {k: v for k, v in tensors.items() if k != missing}, (96, 192))


def test_checkpoint_codes_under_another_storage_dtype():
    weight = weight_of((32, 128), torch.bfloat16)
    layer = bitsandbytes.nn.Linear4bit(128, 32, bias=False, quant_type="nf4", quant_storage=torch.bfloat16)
    layer.load_state_dict({"weight": weight})
    tensors = {f"w.{name}": tensor for name, tensor in layer.to("cpu").state_dict().items()}
    assert tensors["w.weight"].dtype == torch.bfloat16
    parts = NF4().from_checkpoint("w.weight", tensors, (32, 128))
    assert torch.equal(parts["codes"], NF4().encode(weight)["codes"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_keeps_numbers(dtype):
    weight = weight_of((5, 7), dtype)
    codec = Plain(dtype)
    parts = codec.encode(weight)
    assert codec.parts((5, 7)) == {"values": (dtype, (5, 7))}
    assert torch.equal(codec.decode(parts, (5, 7), dtype), weight)
    out = torch.empty(5, 7)
    assert torch.equal(codec.decode(parts, (5, 7), torch.float32, out), weight.float())
    assert hash(codec) == hash(Plain(dtype))
    assert codec != NF4()


def test_wrong_parts_are_refused_by_name():
    parts = NF4(False).encode(weight_of((8, 64), torch.float32))
    with pytest.raises(ValueError, match=r"codes for shape \(8, 128\) must be 512 contiguous torch.uint8"):
        dequantize_nf4(parts["codes"], parts["absmax"], (8, 128), torch.float32)
    with pytest.raises(ValueError, match="absmax"):
        dequantize_nf4(parts["codes"], parts["absmax"].double(), (8, 64), torch.float32)
    with pytest.raises(ValueError, match="out must be"):
        dequantize_nf4(parts["codes"], parts["absmax"], (8, 64), torch.float32, torch.empty(64, 8))
    with pytest.raises(ValueError, match="out must be"):
        dequantize_nf4(parts["codes"], parts["absmax"], (8, 64), torch.float32, torch.empty(64, 8).t())
