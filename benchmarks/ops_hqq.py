"""HQQ in the op benchmark: bit-equality with hqq, rates of decoding by width, seconds of encoding."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from hqq.core.quantize import HQQLinear, hqq_base_quant_config
from torch import nn

from benchmarks.ops_gate import BF16, DEVICE, random, size
from benchmarks.timing import copies, milliseconds
from fsdp_qlora.kernels.hqq_format import BITS
from fsdp_qlora.weights.codecs import HQQ, NF4
from fsdp_qlora.weights.codecs.base import Codec

if TYPE_CHECKING:
    from benchmarks.ops import Table


def hqq_linear(weight: torch.Tensor, codec: HQQ) -> HQQLinear:
    """Return hqq's own linear of that weight."""
    settings = hqq_base_quant_config(codec.bits, codec.group, axis=codec.axis)
    settings["weight_quant_params"]["optimize"] = codec.optimize
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return HQQLinear(linear, settings, compute_dtype=codec.dtype, device=str(weight.device))


def hqq_gate() -> list[str]:
    """Return what is wrong; empty if nothing is."""
    wrong = []
    for shape in [(size(4096), size(4096)), (256, 384), (96, 96)]:
        group = 64 if shape[0] % 64 == 0 else 32
        for bits in BITS:
            for axis in (0, 1):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    weight, codec = random(*shape, dtype=dtype), HQQ(bits, group, axis, dtype)
                    parts, truth = codec.encode(weight), hqq_linear(weight, codec).dequantize()
                    what = f"dequantize {shape} {dtype} {codec.name}"
                    if not torch.equal(codec.decode(parts, shape, dtype), truth):
                        wrong.append(f"{what} differs from hqq")
                    wide = random(2 * shape[0], shape[1] + 16, dtype=dtype)[:, : shape[1]]
                    codec.rows_decoder([parts] * 2, [shape[0]] * 2, shape[1])(wide)
                    if not torch.equal(wide, truth.repeat(2, 1)):
                        wrong.append(f"{what} differs in rows of a wider matrix")
    return wrong


def dequantize_hqq(table: "Table", out_features: int, in_features: int, bits: int, axis: int, group: int = 64) -> None:
    codec = HQQ(bits, group, axis, BF16, optimize=False)
    shape = max(size(out_features), group), max(size(in_features), group)
    n = shape[0] * shape[1]
    n_bytes = 2 * n + n * bits / 8 + 4 * n / group
    ours, wide, theirs = [], [], []
    for i in range(copies(int(n_bytes))):
        weight = random(*shape)
        parts, columns = codec.encode(weight), random(shape[0], shape[1] + 64)[:, : shape[1]]
        ours.append(partial(codec.decode, parts, shape, BF16, weight))
        wide.append(partial(codec.decode, parts, shape, BF16, columns))
        if i < 2:  # hqq's takes new memory each time
            theirs.append(hqq_linear(random(*shape), codec).dequantize)
    ms = {"ours": milliseconds(ours), "in a wider": milliseconds(wide), "hqq": milliseconds(theirs)}
    grouped = f" g{group}" if group != 64 else ""
    table.memory(f"dequantize hqq {bits} bits", f"{shape[0]}x{shape[1]} axis {axis}{grouped}", n_bytes, ms)


def encode_hqq(table: "Table", out_features: int, in_features: int, bits: int) -> None:
    """Read, quantize and pack one weight; the seconds of a model are those of its weights."""
    shape = size(out_features), size(in_features)
    weight = random(*shape) / 64
    encoders: dict[str, Codec] = {
        "ours": HQQ(bits, 64, 1, BF16),
        "not optimized": HQQ(bits, 64, 1, BF16, optimize=False),
        "nf4": NF4(),
    }
    ms = {name: milliseconds([partial(codec.encode, weight)], 5, capture=False) for name, codec in encoders.items()}
    n = weight.numel()
    n_bytes = 2 * n + n * bits / 8 + 4 * n / 64
    table.memory(f"encode hqq {bits} bits", f"{shape[0]}x{shape[1]} on {DEVICE.type}", n_bytes, ms)


LARGE = [(1024, 8192), (8192, 8192), (28672, 8192)]  # 70B's
DECODED = [
    *((*shape, bits, 1) for bits in (8, 4, 3, 2, 1) for shape in LARGE),
    *((8192, 8192, bits, 0) for bits in (8, 4, 3, 2, 1)),
    *((8192, 8192, bits, 1, group) for bits in (4, 3) for group in (32, 128)),
]
ENCODED = [(8192, 8192, bits) for bits in (8, 4, 3, 2)] + [(28672, 8192, 4)]
