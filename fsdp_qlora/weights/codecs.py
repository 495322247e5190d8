"""How a frozen weight becomes bytes and back: NF4 as bitsandbytes has it, bit for bit, or plain floats.

A codec is a small frozen value. It says what it stores for a shape (so a layout can be computed before any weight is
read), encodes a weight into those parts and decodes them into a matrix that can be multiplied.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.nf4 import (
    BLOCK,
    LEVELS,
    NESTED_BLOCK,
    Scales,
    dequantize_nf4,
    dynamic_map,
    nf4_rows,
)

Parts = dict[str, torch.Tensor]
Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Decoder = Callable[[torch.Tensor], None]

# what bitsandbytes appends to a weight's name for the tensors that it keeps of it
CHECKPOINT_SUFFIXES = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
)


class Codec(Protocol):
    """A weight's form in storage. Equal codecs compare equal and hash alike."""

    @property
    def name(self) -> str: ...

    def parts(self, shape: tuple[int, ...]) -> Stored:
        """What is stored for a weight of `shape`: part name -> (dtype, shape), in storage order."""
        ...

    def encode(self, weight: torch.Tensor) -> Parts:
        """The parts of a floating-point weight, contiguous, on the weight's device."""
        ...

    def decode(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weight, of `shape` and `dtype`, on the parts' device.

        out: where it is written if given, contiguous but that a matrix's rows may lie further apart than they are long.
        """
        ...

    def rows_decoder(self, stored: Sequence[Mapping[str, torch.Tensor]], rows: Sequence[int], width: int) -> Decoder:
        """What decodes several matrices of this codec, with so many rows, one below the other into its argument
        [sum of rows, width], as `decode` into `out`: good for as long as the bytes are where they are now."""
        ...


@dataclass(frozen=True)
class Plain:
    """Numbers as they are, in `dtype`. Decoding to the same dtype without `out` returns a view of the stored bytes."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def parts(self, shape: tuple[int, ...]) -> Stored:
        return {"values": (self.dtype, tuple(shape))}

    def encode(self, weight: torch.Tensor) -> Parts:
        return {"values": weight.detach().to(self.dtype).contiguous()}

    def decode(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        values = parts["values"].view(shape)
        return values.to(dtype) if out is None else out.copy_(values)

    def rows_decoder(self, stored: Sequence[Mapping[str, torch.Tensor]], rows: Sequence[int], width: int) -> Decoder:
        values = [parts["values"].view(count, width) for parts, count in zip(stored, rows, strict=True)]

        def decode(out: torch.Tensor) -> None:
            for value, piece in zip(values, out.split(list(rows)), strict=True):
                piece.copy_(value)

        return decode


@cache
def _quantizer() -> Callable[..., Any]:
    """Return bitsandbytes' `quantize_4bit`; this is that library's one door, for a run that quantizes nothing.

    It prepares `torch.compile` of functions that are not used here, which imports all of TorchInductor: 0.9 s of 1.0
    on a fast host, most of four on a slow one."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        from bitsandbytes.functional import quantize_4bit
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    quantize: Callable[..., Any] = quantize_4bit
    return quantize


@dataclass(frozen=True)
class NF4:
    """4-bit NormalFloat in blocks of 64, the format of bitsandbytes' `Linear4bit`.

    4.5 bits a number; with `double_quant` the block scales are 8-bit too and it is 4.127 bits.
    """

    double_quant: bool = True

    @property
    def name(self) -> str:
        return "nf4-double-quantized" if self.double_quant else "nf4"

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

    def encode(self, weight: torch.Tensor) -> Parts:
        codes, state = _quantizer()(
            weight.detach().contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        if not self.double_quant:
            return {"codes": codes.view(-1), "absmax": state.absmax}
        return {
            "codes": codes.view(-1),
            "absmax_q": state.absmax,
            "nested_absmax": state.state2.absmax,
            "offset": state.offset.view(1),
        }

    def decode(
        self,
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return dequantize_nf4(parts["codes"], self._scales(parts), shape, dtype, out)

    def rows_decoder(self, stored: Sequence[Mapping[str, torch.Tensor]], rows: Sequence[int], width: int) -> Decoder:
        return nf4_rows([(parts["codes"], self._scales(parts)) for parts in stored], rows, width)

    def _scales(self, parts: Mapping[str, torch.Tensor]) -> Scales:
        if self.double_quant:
            return parts["absmax_q"], parts["nested_absmax"], parts["offset"]
        return parts["absmax"]

    def from_checkpoint(self, name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> Parts:
        """The parts of a weight that bitsandbytes quantized, taken over bit for bit.

        name: the weight's full name, for messages and lookup. tensors: the checkpoint's tensors of this weight, under
        their names there: `name` itself and those of `CHECKPOINT_SUFFIXES` appended to it. Raises UserError if one is
        missing, if the weight was quantized in another way than this codec's, or if its maps are not the standard ones.
        """
        state = _quant_state(name, tensors)
        nested = "nested_blocksize" in state
        if nested != self.double_quant:
            raise UserError(
                f"{name} in the checkpoint is {'' if nested else 'not '}double-quantized, but double_quant is "
                f"{str(self.double_quant).lower()}: set --double_quant {str(nested).lower()}"
            )
        expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
        if nested:
            expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        for key, value in expected.items():
            if state.get(key) != value:
                raise UserError(f"{name} in the checkpoint has {key} {state.get(key)}, only {value} can be read here")
        _check_map(name, "quant_map", _get(name, ".quant_map", tensors), torch.tensor(LEVELS))
        found = {"codes": _get(name, "", tensors)}
        if nested:
            _check_map(name, "nested_quant_map", _get(name, ".nested_quant_map", tensors), dynamic_map())
            found["absmax_q"] = _get(name, ".absmax", tensors)
            found["nested_absmax"] = _get(name, ".nested_absmax", tensors)
            found["offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        else:
            found["absmax"] = _get(name, ".absmax", tensors)
        return {part: _fit(name, part, found[part], *want) for part, want in self.parts(shape).items()}


def decode_quantized(
    name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a weight that bitsandbytes quantized, in float32 [shape] on `device`. Raises as `NF4.from_checkpoint`."""
    codec = NF4(double_quant="nested_blocksize" in _quant_state(name, tensors))
    parts = {part: tensor.to(device) for part, tensor in codec.from_checkpoint(name, tensors, shape).items()}
    return codec.decode(parts, shape, torch.float32)


def _get(name: str, suffix: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name + suffix not in tensors:
        raise UserError(f"{name + suffix} is missing from the checkpoint: {name} cannot be read without it")
    return tensors[name + suffix]


def _quant_state(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What bitsandbytes notes beside a weight: JSON, stored as a uint8 tensor."""
    note = bytes(_get(name, CHECKPOINT_SUFFIXES[-1], tensors).tolist())
    try:
        state: dict[str, Any] = json.loads(note)
    except ValueError:
        raise UserError(f"{name}{CHECKPOINT_SUFFIXES[-1]} in the checkpoint is not JSON: the file is damaged") from None
    return state


def _check_map(name: str, what: str, found: torch.Tensor, standard: torch.Tensor) -> None:
    if not torch.equal(found.cpu().float(), standard):
        raise UserError(f"{name}.{what} in the checkpoint is not bitsandbytes' standard map: it cannot be read here")


def _fit(name: str, part: str, found: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if found.dtype != dtype and part == "codes":
        found = found.contiguous().view(dtype)  # bnb_4bit_quant_storage: the same bytes under another dtype
    if found.dtype != dtype or found.numel() != math.prod(shape):
        raise UserError(f"{name} in the checkpoint: {part} is {tuple(found.shape)} {found.dtype}, not {shape} {dtype}")
    return found.reshape(shape).contiguous()
