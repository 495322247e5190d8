"""The HQQ codec against hqq itself: `HQQLinear.dequantize`, bit for bit, encoded here or saved by hqq."""

import pytest
import torch
from hqq.core.quantize import HQQLinear, hqq_base_quant_config
from torch import Tensor, nn

from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.hqq_format import BITS
from fsdp_qlora.weights.codecs import HQQ, check_groups, codec_named, companions, hqq_groups, stored_codec
from tests.support.metered import Meter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (128, 192)
NAME = "model.q_proj.weight"


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Outliers, a group of zeros and one of equal numbers, as real weights have them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    weight.view(-1)[::997] *= 30
    weight.view(-1)[64:128] = 0
    weight.view(-1)[128:192] = 0.25
    return weight.to(dtype)


def theirs(weight: Tensor, codec: HQQ, **more: object) -> HQQLinear:
    """hqq's linear of that weight, as hqq and transformers make it."""
    settings = hqq_base_quant_config(codec.bits, codec.group, axis=codec.axis)
    settings["weight_quant_params"] |= {"optimize": codec.optimize, **more}
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.clone()
    return HQQLinear(linear, settings, compute_dtype=codec.dtype, device=str(weight.device))


def saved(linear: HQQLinear) -> dict[str, Tensor]:
    """The tensors of a checkpoint with it, W_q under the weight's own name, as `models.fitting` has them."""
    tensors = {f"model.q_proj.{name}": tensor.clone() for name, tensor in linear.state_dict().items()}
    return {NAME: tensors.pop("model.q_proj.W_q"), **tensors}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_hqq_is_hqqs_own_bit_for_bit(bits, axis, group, dtype, optimize):
    weight, codec = weight_of(SHAPE, dtype), HQQ(bits, group, axis, dtype, optimize)
    parts = codec.encode(weight)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == codec.parts(SHAPE)
    truth = theirs(weight, codec).dequantize()
    decoded = codec.decode(parts, SHAPE, dtype)
    assert torch.equal(decoded, truth)
    assert not torch.equal(decoded, weight), "nothing was rounded"
    out = torch.full(SHAPE, float("nan"), dtype=dtype)
    assert codec.decode(parts, SHAPE, dtype, out) is out
    assert torch.equal(out, truth)
    assert codec_named(codec.name) == codec


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu_the_kernel_gives_hqqs_own_numbers(bits, axis, dtype):
    """Quantized there by hqq, whose optimizer computes in float16 on a GPU; matrices alone, apart and together."""
    for group, shape in ((64, (1024, 4096)), (128, (256, 384)), (32, (96, 96))):
        weight, codec = weight_of(shape, dtype).cuda(), HQQ(bits, group, axis, dtype)
        parts, truth = codec.encode(weight), theirs(weight, codec).dequantize()
        assert torch.equal(codec.decode(parts, shape, dtype), truth)
        rows, width = shape
        for apart in (16, 3):
            wide = torch.full((3 * rows, width + apart), 7.0, dtype=dtype, device="cuda")
            codec.rows_decoder([parts] * 3, [rows] * 3, width)(wide[:, :width])
            assert torch.equal(wide[:, :width], truth.repeat(3, 1))
            assert (wide[:, width:] == 7).all()


def test_bits_a_number_are_those_asked_for():
    for bits in BITS:
        parts = HQQ(bits, 64, 1, torch.bfloat16).encode(weight_of(SHAPE, torch.bfloat16))
        assert sum(part.nbytes for part in parts.values()) * 8 == 128 * 192 * (bits + 0.5)


@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_of_hqq_is_taken_over_bit_for_bit(bits, axis, stored, view_as_float):
    weight = weight_of(SHAPE, torch.float32)
    linear = theirs(weight, HQQ(bits, 64, axis, stored), view_as_float=view_as_float)
    tensors = saved(linear)
    assert tensors.keys() <= {NAME, *companions(NAME)}
    assert stored_codec(NAME, tensors) == HQQ(bits, 64, axis, stored)
    for dtype in DTYPES:  # loaded by hqq to compute in that
        again = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
        again.load_state_dict(dict(linear.state_dict()))
        codec = HQQ(bits, 64, axis, dtype)
        decoded = codec.decode(codec.from_checkpoint(NAME, tensors, SHAPE), SHAPE, dtype)
        assert torch.equal(decoded, again.dequantize()), dtype


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_of_hqq_takes_no_more_memory_than_encoding(bits, axis, monkeypatch):
    shape, codec = (512, 1024), HQQ(bits, 64, axis, torch.bfloat16)
    monkeypatch.setattr(hqq_groups, "MOST", 512 * 1024 // 28)  # as many pieces as of 70B's largest matrix
    tensors = saved(theirs(weight_of(shape, torch.bfloat16), codec))
    with Meter(on="cpu") as meter:
        for tensor in tensors.values():
            meter.add(tensor)
        codec.from_checkpoint(NAME, tensors, shape)
    assert meter.peak <= codec.encode_scratch_bytes(shape, 2)


def test_a_checkpoint_that_says_something_else_is_refused_by_name():
    codec = HQQ(4, 64, 1, torch.float32)
    tensors = saved(theirs(weight_of(SHAPE, torch.float32), codec))

    def told(more: dict[str, Tensor], reader: HQQ = codec, shape: tuple[int, int] = SHAPE) -> str:
        with pytest.raises(UserError) as caught:
            reader.from_checkpoint(NAME, tensors | {f"model.q_proj.{name}": t for name, t in more.items()}, shape)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "[128, 192] in 4 bits in groups of 64 along axis 1; [128, 192] in 3 bits" in told(
        {}, HQQ(3, 64, 1, codec.dtype)
    )
    assert "along axis 0 belongs there" in told({}, HQQ(4, 64, 0, codec.dtype))
    assert "[128, 256] in 4 bits" in told({}, shape=(128, 256))
    assert "5 bits packed as 4bit_u8" in told({"nbits": torch.tensor(5)})
    assert "groups of 12 along axis 1" in told({"group_size": torch.tensor(12)})
    assert "scales or zeros quantized too" in told({"quant_scale": torch.tensor(1)})
    assert "scale is (3,)" in told({"scale": torch.zeros(3)})
    assert "model.q_proj.nbits in the checkpoint is no single number" in told({"nbits": torch.zeros(2)})
    with pytest.raises(UserError, match=r"W_q is \(3, 3\)"):
        codec.from_checkpoint(NAME, tensors | {NAME: torch.zeros(3, 3, dtype=torch.uint8)}, SHAPE)
    read = ("scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "quant_scale", "quant_zero")
    for name in read:
        with pytest.raises(UserError, match=rf"q_proj\.{name} is missing"):
            codec.from_checkpoint(NAME, {k: t for k, t in tensors.items() if not k.endswith(f".{name}")}, SHAPE)
    with pytest.raises(UserError, match=r"q_proj\.W_q is missing"):
        codec.from_checkpoint(NAME, {k: t for k, t in tensors.items() if k != NAME}, SHAPE)


@pytest.mark.parametrize(
    ("codec", "shapes", "words"),
    [
        (HQQ(4, 128, 1, torch.float32), [(64, 192)], ["its 192 inputs are no multiple of 128", "set it to 32 or 64"]),
        (HQQ(4, 128, 1, torch.float32), [(64, 192), (64, 96)], ["[64, 192]", "its 192 inputs", "; set it to 32"]),
        (HQQ(4, 128, 1, torch.float32), [(64, 256), (64, 96)], ["[64, 96]", "its 96 inputs", "; set it to 32"]),
        (
            HQQ(4, 32, 1, torch.float32),
            [(64, 144)],
            ["its 144 inputs", "; use --hqq_axis 0 and --hqq_group_size 32 or 64"],
        ),
        (HQQ(4, 32, 1, torch.float32), [(64, 144), (72, 64)], ["its 144 inputs", "; use --train_type bnb_dora"]),
        (
            HQQ(4, 64, 0, torch.float32),
            [(96, 192)],
            ["along axis 0", "its 96 outputs are no multiple of 64", "; set it to 32"],
        ),
        (
            HQQ(4, 64, 0, torch.float32),
            [(64, 100)],
            ["its 100 inputs are no multiple of 8", "; use --train_type bnb_dora"],
        ),
    ],
)
def test_weights_without_such_groups_are_refused_in_one_line(codec, shapes, words):
    with pytest.raises(UserError) as caught:
        check_groups([(codec, shape) for shape in shapes], "bnb_dora")
    told = str(caught.value)
    assert told.startswith("hqq_group_size: ")
    assert "\n" not in told
    for word in words:
        assert word in told
    assert told.endswith(words[-1])


def test_weights_that_all_have_such_groups_are_taken():
    check_groups([(HQQ(4, 32, 1, torch.float32), shape) for shape in ((64, 192), (72, 96))], "qlora")
