"""Linears of one input for a step's few rows: how their weights are read, with their adapters.

M rows, I in features, O out features, R the columns of adapters that read an input.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fsdp_qlora.models.fused.scratch import WeightScratch
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.weights.codecs import FewRowsCodec
from fsdp_qlora.weights.frozen_bytes import decode_rows

CODES_ROWS = 32  # up to which codes are multiplied as they are


class _Adapter(NamedTuple):
    """An adapter's B [O', R'], and which of the stacked A's columns are its; DoRA's factor [O'] of the outputs."""

    b: Tensor
    columns: slice
    factor: Tensor | None


class StepLinears:
    """y = [x W^T + b + scale * x A^T B^T] of several linears, their outputs one beside the other, for [M, I]; with
    magnitudes c (x W^T + scale * x A^T B^T) + b.

    The matrices lie decoded in `copy` and cuBLAS multiplies. Where there is no memory for that, codes are read as they
    are for up to `CODES_ROWS` rows (`kernels/few_rows.py`), and decoded into scratch one below the other for more.
    x A^T is one product for all."""

    def __init__(self, linears: Sequence[FrozenLinear], scratch: WeightScratch) -> None:
        self.linears, self.scratch = tuple(linears), scratch
        self.in_features = linears[0].in_features
        self.widths = [linear.out_features for linear in linears]
        self.copy: Tensor | None = None  # [O, I] of the compute dtype
        codecs = [linear.weight.home.layout.entries[linear.weight.name].codec for linear in linears]
        self._is_quantized = any(codec.quantizes for codec in codecs)
        able = [codec for codec in codecs if isinstance(codec, FewRowsCodec)]
        self._by_codes = able if len(able) == len(codecs) else []  # the linears' codecs, if all can
        self._adapters: list[_Adapter | None] | None = None  # made when they are first used: they get values late
        self._a: Tensor | None = None  # [R, I], the A's one below the other
        self._scale = 1.0

    @property
    def copy_bytes(self) -> int:
        """Bytes of a decoded copy; 0 where the weights are numbers already."""
        return sum(self.widths) * self.in_features * self.scratch.dtype.itemsize if self._is_quantized else 0

    def decode(self) -> None:
        """Keep a decoded copy from now on."""
        matrix = self.scratch.buffer.new_empty(sum(self.widths), self.in_features)
        decode_rows([linear.weight for linear in self.linears], matrix)
        self.copy = matrix

    def __call__(self, x: Tensor) -> Tensor:
        """Return [M, O]."""
        xa = self._adapted(x)
        out = x.new_empty(x.shape[0], sum(self.widths))
        pieces = out.split(self.widths, dim=1)
        if self.copy is None and self._takes_codes(x):
            self._from_codes(x, xa, pieces)
            return out
        if self.copy is None and not self._is_quantized:  # views of the frozen bytes
            for linear, piece in zip(self.linears, pieces, strict=True):
                torch.mm(x, linear.weight.decode(x.dtype).t(), out=piece)
        else:
            torch.mm(x, self._matrix().t(), out=out)
        for linear, piece, adapter in zip(self.linears, pieces, self._made(), strict=True):
            bias = None if linear.bias is None else linear.bias.decode(x.dtype)
            factor = None if adapter is None else adapter.factor
            if bias is not None and factor is None:
                piece.add_(bias)
            if adapter is not None and xa is not None:
                piece.addmm_(xa[:, adapter.columns], adapter.b.t())
            if factor is not None:
                _finish_(piece, factor, bias)
        return out

    def _takes_codes(self, x: Tensor) -> bool:
        few = bool(self._by_codes) and x.shape[0] <= CODES_ROWS
        return few and all(codec.takes_few_rows(x, self.in_features) for codec in self._by_codes)

    def _from_codes(self, x: Tensor, xa: Tensor | None, pieces: Sequence[Tensor]) -> None:
        for linear, codec, piece, adapter in zip(self.linears, self._by_codes, pieces, self._made(), strict=True):
            bias = None if linear.bias is None else linear.bias.decode(piece.dtype)
            factor = None if adapter is None else adapter.factor
            codec.few_rows(
                x, linear.weight.home.parts(linear.weight.name), piece, bias if factor is None else None,
                None if adapter is None or xa is None else xa[:, adapter.columns],
                None if adapter is None else adapter.b,
            )  # fmt: skip
            if factor is not None:
                _finish_(piece, factor, bias)

    def _matrix(self) -> Tensor:
        if self.copy is not None:
            return self.copy
        matrix = self.scratch.room(sum(self.widths), self.in_features)
        decode_rows([linear.weight for linear in self.linears], matrix)
        return matrix

    def _adapted(self, x: Tensor) -> Tensor | None:
        """Return scale * x A^T [M, R], None without adapters."""
        self._made()
        if self._a is None:
            return None
        out = x.new_empty(x.shape[0], self._a.shape[0])
        return torch.addmm(out, x, self._a.t(), beta=0, alpha=self._scale, out=out)

    def forget_adapters(self) -> None:
        """Read the adapters anew when they are next used: their values have changed."""
        self._adapters = self._a = None

    def _made(self) -> list[_Adapter | None]:
        if self._adapters is not None:
            return self._adapters
        made: list[_Adapter | None] = []
        stacked, at = list[Tensor](), 0
        for linear in self.linears:
            a, b = linear.lora_A, linear.lora_B
            if a is None or b is None:
                made.append(None)
                continue
            stacked.append(a.detach())
            factor = linear.factor()
            made.append(_Adapter(b.detach(), slice(at, at + a.shape[0]), None if factor is None else factor.detach()))
            at, self._scale = at + a.shape[0], linear.scale
        self._adapters, self._a = made, torch.cat(stacked) if len(stacked) > 1 else next(iter(stacked), None)
        return made


def _finish_(out: Tensor, factor: Tensor, bias: Tensor | None) -> None:
    """out [M, O'] * factor + bias, in place."""
    out.mul_(factor)
    if bias is not None:
        out.add_(bias)
