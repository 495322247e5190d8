"""HQQ: half-quadratic quantization to 8, 4, 3, 2 or 1 bits, encoded by hqq itself and decoded to its very numbers."""

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.hqq import dequantize_hqq, hqq_rows
from fsdp_qlora.kernels.hqq_few_rows import can_multiply, hqq_few_rows
from fsdp_qlora.kernels.hqq_format import Form, HqqParts, pack, planes, unfit
from fsdp_qlora.weights.codecs.base import CheckpointCodec, Codec, CodecFamily, CodecOf, Decoder, Parts, Stored
from fsdp_qlora.weights.codecs.finite import finite
from fsdp_qlora.weights.codecs.hqq_groups import Groups, largest_piece
from fsdp_qlora.weights.codecs.hqq_tensors import (
    CODES,
    READ,
    SETTINGS,
    UNREAD,
    WEIGHT,
    codes_of,
    companion,
    declared,
    describe,
    floats_of,
    tag_of,
)
from fsdp_qlora.weights.codecs.pieces import new_parts

NAME = re.compile(r"hqq-(\d)bit-g(\d+)-axis([01])-(bfloat16|float16|float32)(-unoptimized)?")
GROUPS = (32, 64, 128)  # that an option can ask for
USUAL = Form(bits=4, group=64, axis=1)  # where options leave it open
# Bytes on a GPU: of each number of a piece, metered; of each number of a weight, its error; of a group, its floats.
SCRATCH, ERROR, FLOATS = 14, 2, 8


@dataclass(frozen=True)
class HQQ:
    """Codes of `bits` bits with a scale and a zero in `dtype` for each `group` of numbers: hqq's `HQQLinear`.

    bits + 32 / group bits a number where `dtype` has 16. Decoded to `dtype`, each number is hqq's own."""

    bits: int
    group: int
    axis: int  # 1: a group is of one row; 0: of one column
    dtype: torch.dtype  # in which hqq computes, and its scales and zeros are
    optimize: bool = True  # whether hqq fits each group's zero to the weights when it encodes

    @property
    def name(self) -> str:
        form = f"hqq-{self.bits}bit-g{self.group}-axis{self.axis}-{str(self.dtype).removeprefix('torch.')}"
        return form if self.optimize else f"{form}-unoptimized"

    @property
    def quantizes(self) -> bool:
        return True

    @property
    def encoder(self) -> str:
        return "hqq"

    @property
    def form(self) -> Form:
        return Form(self.bits, self.group, self.axis)

    def parts(self, shape: tuple[int, ...]) -> Stored:
        """Return what is stored, as a codec does. Raises UserError for a shape that has no such groups."""
        why = unfit(self.form, shape)
        if why:
            raise UserError(
                f"hqq_group_size: {self.group} along axis {self.axis} does not fit a linear of {list(shape)}: {why}"
            )
        groups = (math.prod(shape) // self.group,)
        return planes(self.bits, math.prod(shape)) | {"scale": (self.dtype, groups), "zero": (self.dtype, groups)}

    def encode_scratch_bytes(self, shape: tuple[int, ...], itemsize: int, on_device: bool = False) -> int:
        numel = math.prod(shape)
        brought, error = 0 if on_device else itemsize * numel, ERROR * numel if self.optimize else 0
        piece = largest_piece(numel, self.axis)
        return brought + error + SCRATCH * piece + FLOATS * (numel // self.group)

    def encode(self, weight: Tensor, out: Parts | None = None) -> Parts:
        """Write the parts as hqq makes them, as a codec does."""
        out = new_parts(self.parts(tuple(weight.shape)), weight.device) if out is None else out
        groups = Groups(finite(weight.detach().to(out["codes"].device)), self.bits, self.group, self.axis)
        scale, zero = groups.floats(self.optimize)
        for piece in groups.pieces:
            for plane, words in pack(groups.codes(piece, scale, zero), self.bits).items():
                each = out[plane].numel() // groups.weight.shape[0]
                out[plane][piece.start * each :][: words.numel()].copy_(words)
        out["scale"].copy_((1.0 / scale).view(-1))
        out["zero"].copy_(zero.view(-1))
        return out

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        rows, width = shape
        return dequantize_hqq(_stored(parts), self.form, (rows, width), dtype, out)

    def rows_decoder(self, stored: Sequence[Mapping[str, Tensor]], rows: Sequence[int], width: int) -> Decoder:
        return hqq_rows([_stored(parts) for parts in stored], self.form, rows, width)

    def takes_few_rows(self, like: Tensor, in_features: int) -> bool:
        return can_multiply(like, self.form)

    def few_rows(
        self, x: Tensor, parts: Mapping[str, Tensor], out: Tensor, bias: Tensor | None, xa: Tensor | None,
        b: Tensor | None,
    ) -> None:  # fmt: skip
        hqq_few_rows(x, _stored(parts), self.form, out, bias=bias, xa=xa, b=b)

    def from_checkpoint(self, weight: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        """Return the parts of a quantized weight, as a `CheckpointCodec` does.

        Scales and zeros are rounded to `dtype`, as hqq does when it loads them to compute in that."""
        found = describe(weight, tensors)
        if found != (self.form, tuple(shape)):
            raise UserError(
                f"{weight} in the checkpoint is {list(found.shape)} in {_words(found.form)}; {list(shape)} in "
                f"{_words(self.form)} belongs there"
            )
        floats = {name: floats_of(weight, name, tensors, found, self.dtype) for name in ("scale", "zero")}
        return pack(codes_of(weight, tensors, found), self.bits) | floats


class HQQFamily(CodecFamily):
    """HQQ in all of its widths, groups and axes."""

    def named(self, name: str) -> Codec | None:
        found = NAME.fullmatch(name)
        if found is None:
            return None
        bits, group, axis, dtype, plainly = found.groups()
        return HQQ(int(bits), int(group), int(axis), getattr(torch, dtype), plainly is None)

    def from_options(self, options: ModelOptions, compute_dtype: torch.dtype) -> Codec:
        asked = (options.n_bits, options.hqq_group_size, options.hqq_axis)
        bits, group, axis = (usual if value is None else value for value, usual in zip(asked, USUAL, strict=True))
        return HQQ(bits, group, axis, compute_dtype, options.hqq_optimize)

    def from_hf_config(self, quantization_config: Mapping[str, Any], compute_dtype: torch.dtype) -> CodecOf | None:
        forms = declared(quantization_config)
        if forms is None:
            return None

        def codec_of(weight: str) -> HQQ:
            form = forms.get(tag_of(weight), forms.get(""))
            if form is None:
                raise UserError(
                    f"model_name: {weight} is quantized in the checkpoint, and its config.json does not say how "
                    f"(quant_config has {', '.join(forms)})"
                )
            return HQQ(*form, compute_dtype)

        return codec_of

    def described(self, weight: str, tensors: Mapping[str, Tensor], compute_dtype: torch.dtype) -> Codec | None:
        if not self.is_quantized(weight, tensors.keys()):
            return None
        return HQQ(*describe(weight, tensors).form, compute_dtype)

    def telling(self, weight: str) -> tuple[str, ...]:
        return tuple(companion(weight, name) for name in SETTINGS)

    def companions(self, weight: str) -> tuple[str, ...]:
        return tuple(companion(weight, name) for name in (*READ, *UNREAD))

    def weight_of(self, name: str) -> str | None:
        return name.removesuffix(CODES) + WEIGHT if name.endswith(CODES) else None

    def is_quantized(self, weight: str, names: Set[str]) -> bool:
        return companion(weight, "nbits") in names

    def stored_codec(self, weight: str, tensors: Mapping[str, Tensor]) -> CheckpointCodec | None:
        if not self.is_quantized(weight, tensors.keys()):
            return None
        scale = tensors.get(companion(weight, "scale"))
        return HQQ(*describe(weight, tensors).form, torch.float32 if scale is None else scale.dtype)


def _stored(parts: Mapping[str, Tensor]) -> HqqParts:
    return HqqParts(parts["codes"], parts.get("high"), parts["scale"], parts["zero"])


def _words(form: Form) -> str:
    return f"{form.bits} bits in groups of {form.group} along axis {form.axis}"


def check_groups(linears: Sequence[tuple[HQQ, tuple[int, ...]]], without: str) -> None:
    """Raise UserError where one of a model's linears has no such groups, with the options that fit all of them.

    linears: (codec, shape) of each; codecs are alike. without: the train type whose base has no groups."""
    for codec, shape in linears:
        try:
            codec.parts(shape)
        except UserError as error:
            raise UserError(f"{error}; {_remedy(codec.axis, {shape for _, shape in linears}, without)}") from None


def _remedy(axis: int, shapes: Set[tuple[int, ...]], without: str) -> str:
    def fitting(axis: int) -> str:
        groups = (g for g in GROUPS if not any(unfit(USUAL._replace(group=g, axis=axis), shape) for shape in shapes))
        return " or ".join(map(str, groups))

    if groups := fitting(axis):
        return f"set it to {groups}"
    if groups := fitting(1 - axis):
        return f"use --hqq_axis {1 - axis} and --hqq_group_size {groups}"
    return f"use --train_type {without}"
