"""NF4, the 4-bit format of bitsandbytes, bit for bit; this file alone knows how its checkpoints name their tensors."""

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.nf4 import dequantize_nf4, nf4_rows
from fsdp_qlora.kernels.nf4_few_rows import can_multiply, nf4_few_rows
from fsdp_qlora.kernels.nf4_format import BLOCK, LEVELS, NESTED_BLOCK, Scales, dynamic_map
from fsdp_qlora.weights.codecs.base import CheckpointCodec, Codec, CodecFamily, CodecOf, Decoder, Parts, Stored
from fsdp_qlora.weights.codecs.finite import finite
from fsdp_qlora.weights.codecs.nf4_cpu import quantize_blocks
from fsdp_qlora.weights.codecs.pieces import for_each, new_parts, piece_numbers, spans
from fsdp_qlora.weights.codecs.quantizers import bitsandbytes_quantizers

FLOAT = 4  # bytes of a scale
SMALL = 64 << 10  # bytes of tables and sums that encoding takes whatever the weight
ABSMAX, QUANT_STATE = ".absmax", ".quant_state.bitsandbytes__nf4"
# What bitsandbytes appends to a weight's name for the other tensors of a quantized weight.
SUFFIXES = (ABSMAX, ".quant_map", ".nested_absmax", ".nested_quant_map", QUANT_STATE)


@dataclass(frozen=True)
class NF4:
    """4-bit NormalFloat in blocks of 64, the format of bitsandbytes' `Linear4bit`.

    4.5 bits a number; with `double_quant` the block scales are 8-bit too and it is 4.127 bits.
    """

    double_quant: bool = True

    @property
    def name(self) -> str:
        return "nf4-double-quantized" if self.double_quant else "nf4"

    @property
    def quantizes(self) -> bool:
        return True

    @property
    def encoder(self) -> str:
        return "bitsandbytes"

    def parts(self, shape: tuple[int, ...]) -> Stored:
        numel = math.prod(shape)
        blocks = -(-numel // BLOCK)
        codes: Stored = {"codes": (torch.uint8, (-(-numel // 2),))}
        if not self.double_quant:
            return codes | {"absmax": (torch.float32, (blocks,))}
        return codes | {
            "absmax_q": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
            "offset": (torch.float32, (1,)),
        }

    def encode_scratch_bytes(self, shape: tuple[int, ...], itemsize: int, on_device: bool = False) -> int:
        numel = math.prod(shape)
        piece = min(numel, piece_numbers(itemsize))
        scales = -(-numel // BLOCK) * (FLOAT + 1) if self.double_quant else 0  # in float32 and in 8 bits
        brought = (0 if on_device else piece * itemsize) + -(-piece // 2) + -(-piece // BLOCK) * FLOAT
        published = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.parts(shape).values())
        return max(brought + scales, published) + SMALL

    def encode(self, weight: Tensor, out: Parts | None = None) -> Parts:
        """Write the parts as bitsandbytes makes them of the whole weight, as a codec does.

        Blocks are quantized a piece of the weight at a time, then the scales of all of them together."""
        out = new_parts(self.parts(tuple(weight.shape)), weight.device) if out is None else out
        numbers, codes = weight.detach().reshape(-1), out["codes"]
        blocks = -(-numbers.numel() // BLOCK)
        absmax = codes.new_empty(blocks, dtype=torch.float32) if self.double_quant else out["absmax"]

        def quantize(span: tuple[int, int]) -> None:
            first, end = span
            piece = finite(numbers[first:end].to(codes.device))
            _quantize(piece, codes[first // 2 : -(-end // 2)], absmax[first // BLOCK : -(-end // BLOCK)])

        for_each(quantize, spans(numbers.numel(), piece_numbers(weight.itemsize, codes.device), BLOCK), codes.device)
        if self.double_quant:
            _quantize_scales(absmax, out)
        return out

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        return dequantize_nf4(parts["codes"], self.scales(parts), shape, dtype, out)

    def rows_decoder(self, stored: Sequence[Mapping[str, Tensor]], rows: Sequence[int], width: int) -> Decoder:
        return nf4_rows([(parts["codes"], self.scales(parts)) for parts in stored], rows, width)

    def takes_few_rows(self, like: Tensor, in_features: int) -> bool:
        return can_multiply(like, in_features)

    def few_rows(
        self, x: Tensor, parts: Mapping[str, Tensor], out: Tensor, bias: Tensor | None, xa: Tensor | None,
        b: Tensor | None,
    ) -> None:  # fmt: skip
        nf4_few_rows(x, parts["codes"], self.scales(parts), out, bias=bias, xa=xa, b=b)

    def scales(self, parts: Mapping[str, Tensor]) -> Scales:
        if self.double_quant:
            return parts["absmax_q"], parts["nested_absmax"], parts["offset"]
        return parts["absmax"]

    def from_checkpoint(self, weight: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        state = _quant_state(weight, tensors)
        nested = "nested_blocksize" in state
        if nested != self.double_quant:
            raise UserError(
                f"{weight} in the checkpoint is {'' if nested else 'not '}double-quantized, but double_quant is "
                f"{str(self.double_quant).lower()}: set --double_quant {str(nested).lower()}"
            )
        expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
        if nested:
            expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        for key, value in expected.items():
            if state.get(key) != value:
                raise UserError(f"{weight} in the checkpoint has {key} {state.get(key)}, only {value} can be read here")
        _check_map(weight, "quant_map", _get(weight, ".quant_map", tensors), torch.tensor(LEVELS))
        found = {"codes": _get(weight, "", tensors)}
        if nested:
            _check_map(weight, "nested_quant_map", _get(weight, ".nested_quant_map", tensors), dynamic_map())
            found["absmax_q"] = _get(weight, ".absmax", tensors)
            found["nested_absmax"] = _get(weight, ".nested_absmax", tensors)
            found["offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        else:
            found["absmax"] = _get(weight, ".absmax", tensors)
        return {part: _fit(weight, part, found[part], *want) for part, want in self.parts(shape).items()}


class NF4Family(CodecFamily):
    """NF4, with block scales in float32 or double-quantized."""

    def named(self, name: str) -> Codec | None:
        return next((codec for codec in (NF4(True), NF4(False)) if codec.name == name), None)

    def from_options(self, options: ModelOptions, compute_dtype: torch.dtype) -> Codec:
        return NF4(options.double_quant)

    def from_hf_config(self, quantization_config: Mapping[str, Any], compute_dtype: torch.dtype) -> CodecOf | None:
        if not quantization_config.get("load_in_4bit") or quantization_config.get("bnb_4bit_quant_type") != "nf4":
            return None
        codec = NF4(bool(quantization_config.get("bnb_4bit_use_double_quant")))
        return lambda weight: codec

    def companions(self, weight: str) -> tuple[str, ...]:
        return tuple(weight + suffix for suffix in SUFFIXES)

    def is_quantized(self, weight: str, names: Set[str]) -> bool:
        return weight + ABSMAX in names

    def stored_codec(self, weight: str, tensors: Mapping[str, Tensor]) -> CheckpointCodec | None:
        if not self.is_quantized(weight, tensors.keys()):
            return None
        return NF4(double_quant="nested_blocksize" in _quant_state(weight, tensors))


def _quantize(numbers: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Write the codes and scales of whole blocks of numbers, the last of which may be shorter."""
    if numbers.device.type == "cpu":
        whole = numbers.numel() // BLOCK * BLOCK
        quantize_blocks(numbers[:whole], codes[: whole // 2], absmax[: whole // BLOCK])
        numbers, codes, absmax = numbers[whole:], codes[whole // 2 :], absmax[whole // BLOCK :]
        if not numbers.numel():
            return
    found, state = bitsandbytes_quantizers()[0](numbers, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    codes.copy_(found.view(-1))
    absmax.copy_(state.absmax)


def _quantize_scales(absmax: Tensor, out: Parts) -> None:
    """Write the scales of a whole weight in 8 bits, as `quantize_4bit` does with `compress_statistics`.

    absmax: float32 [blocks], overwritten."""
    offset = absmax.mean()
    found, state = bitsandbytes_quantizers()[1](absmax.sub_(offset), blocksize=NESTED_BLOCK)
    out["absmax_q"].copy_(found)
    out["nested_absmax"].copy_(state.absmax)
    out["offset"].copy_(offset)


def _get(name: str, suffix: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name + suffix not in tensors:
        raise UserError(f"{name + suffix} is missing from the checkpoint: {name} cannot be read without it")
    return tensors[name + suffix]


def _quant_state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return bitsandbytes' description of a quantized weight: JSON, stored as a uint8 tensor."""
    note = bytes(_get(name, QUANT_STATE, tensors).tolist())
    try:
        state: dict[str, Any] = json.loads(note)
    except ValueError:
        raise UserError(f"{name}{QUANT_STATE} in the checkpoint is not JSON: the file is damaged") from None
    return state


def _check_map(name: str, what: str, found: Tensor, standard: Tensor) -> None:
    if not torch.equal(found.cpu().float(), standard):
        raise UserError(f"{name}.{what} in the checkpoint is not bitsandbytes' standard map: it cannot be read here")


def _fit(name: str, part: str, found: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if found.dtype != dtype and part == "codes":
        found = found.contiguous().view(dtype)  # bnb_4bit_quant_storage: the same bytes under another dtype
    if found.dtype != dtype or found.numel() != math.prod(shape):
        raise UserError(f"{name} in the checkpoint: {part} is {tuple(found.shape)} {found.dtype}, not {shape} {dtype}")
    return found.reshape(shape).contiguous()
