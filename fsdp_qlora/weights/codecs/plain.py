"""Plain floating-point numbers: the codec of what is not quantized."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.kernels.dora import scale_rows_
from fsdp_qlora.weights.codecs.base import Codec, CodecFamily, Decoder, Parts, Stored
from fsdp_qlora.weights.codecs.pieces import piece_numbers, spans


@dataclass(frozen=True)
class Plain:
    """Numbers as they are, in `dtype`. Decoding to the same dtype without `out` returns a view of the stored bytes."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def quantizes(self) -> bool:
        return False

    @property
    def encoder(self) -> str:
        return ""

    def parts(self, shape: tuple[int, ...]) -> Stored:
        return {"values": (self.dtype, tuple(shape))}

    def encode_scratch_bytes(self, shape: tuple[int, ...], itemsize: int, on_device: bool = False) -> int:
        return 0 if on_device else min(math.prod(shape), piece_numbers(itemsize)) * itemsize

    def encode(self, weight: Tensor, out: Parts | None = None) -> Parts:
        if out is None:
            return {"values": weight.detach().to(self.dtype).contiguous()}
        numbers, values = weight.detach().reshape(-1), out["values"].view(-1)
        for first, end in spans(numbers.numel(), piece_numbers(weight.itemsize)):
            values[first:end].copy_(numbers[first:end].to(values.device))  # rounded there, not by the host
        return out

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        values = parts["values"].view(shape)
        return values.to(dtype) if out is None else out.copy_(values)

    def rows_decoder(self, stored: Sequence[Mapping[str, Tensor]], rows: Sequence[int], width: int) -> Decoder:
        values = [parts["values"].view(count, width) for parts, count in zip(stored, rows, strict=True)]
        stored_dtype = self.dtype

        def decode(out: Tensor, factor: Tensor | None = None) -> None:
            if factor is None or out.dtype != stored_dtype:
                for value, piece in zip(values, out.split(list(rows)), strict=True):
                    piece.copy_(value)
                if factor is not None:
                    scale_rows_(out, factor)
                return
            factors = factor[:, None].split(list(rows))
            for value, own, piece in zip(values, factors, out.split(list(rows)), strict=True):
                torch.mul(value, own, out=piece)  # rounded once as well

        return decode


class PlainFamily(CodecFamily):
    """Floats in the compute dtype."""

    def named(self, name: str) -> Codec | None:
        dtype = getattr(torch, name, None)
        return Plain(dtype) if isinstance(dtype, torch.dtype) else None

    def from_options(self, options: ModelOptions, compute_dtype: torch.dtype) -> Codec:
        return Plain(compute_dtype)
