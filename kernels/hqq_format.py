"""The HQQ format: codes in words of eight, a scale and a zero for each group, and what a stored tensor must look like.

HQQ (Half-Quadratic Quantization, Badri and Shaji 2023; as the package hqq decodes it). A group of G numbers shares one
scale and one zero, and a number is an unsigned code of 8, 4, 3, 2 or 1 bits:

    number = round(round(code - zero) * scale)             two roundings, both to the dtype of scale and zero

Along axis 1 a group is G numbers that follow each other in a row. Along axis 0 the matrix [O, I] is read as G lines of
n / G numbers, and group j is the j-th number of every line.

Codes are stored here as words of eight numbers, the first in the lowest bits: one load for what one thread of the
kernel writes, and words of neighbours are neighbours. That is neither hqq's order, in which a byte holds numbers from
far apart, nor its size for 3 bits: hqq puts ten codes into 32 bits. Here 3 bits are two planes, one with the low two
bits of each code and one with the high bit, so that no code lies across two words.
"""

import math
from typing import NamedTuple

import torch

from fsdp_qlora.kernels.decoded import DTYPES

EIGHT = 8  # numbers in a word
BITS = (8, 4, 3, 2, 1)
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # the dtype of eight codes by their bits


class Form(NamedTuple):
    """How codes are made: their bits, numbers in a group, and the axis along which a group runs."""

    bits: int
    group: int
    axis: int


class HqqParts(NamedTuple):
    """A stored matrix. high: the plane of high bits of a 3-bit matrix, of others None."""

    codes: torch.Tensor
    high: torch.Tensor | None
    scale: torch.Tensor
    zero: torch.Tensor


def planes(bits: int, n: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the stored planes of `n` codes: name -> (dtype, shape). n: a multiple of eight."""
    if bits == 8:
        return {"codes": (torch.uint8, (n,))}
    if bits == 3:
        return {"codes": (torch.int16, (n // EIGHT,)), "high": (torch.uint8, (n // EIGHT,))}
    return {"codes": (_WORDS[bits], (n // EIGHT,))}


def pack(codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Return the planes of codes: of any dtype that holds them exactly, any shape, read in row order."""
    codes = codes.reshape(-1)
    if bits == 8:
        return {"codes": codes.to(torch.uint8)}
    if bits == 3:
        eights = codes.to(torch.uint8)
        return {"codes": _words(eights & 3, 2), "high": _words(eights >> 2, 1)}
    return {"codes": _words(codes, bits)}


def unpack(codes: torch.Tensor, high: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Return the codes in row order: integers [n]."""
    if bits == 8:
        return codes
    if high is not None:
        return _codes(codes, 2) | (_codes(high, 1) << 2)
    return _codes(codes, bits)


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    eights = codes.view(-1, EIGHT)
    words = torch.zeros(eights.shape[0], dtype=torch.int32, device=codes.device)
    for place in range(EIGHT):
        words |= eights[:, place].to(torch.int32) << (place * bits)
    return words.to(_WORDS[bits])  # of int32 the low bits, whatever their sign


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, EIGHT * bits, bits, dtype=words.dtype, device=words.device)
    return ((words.view(-1, 1) >> shifts) & ((1 << bits) - 1)).view(-1)


def unfit(form: Form, shape: tuple[int, ...]) -> str:
    """Return why a weight of that shape has no such groups, or ''."""
    if len(shape) != 2:
        return f"it has {len(shape)} dimensions and not 2"
    if form.axis == 1 and shape[1] % form.group:
        return f"its {shape[1]} inputs are no multiple of {form.group}"
    if form.axis == 0 and shape[0] % form.group:
        return f"its {shape[0]} outputs are no multiple of {form.group}"
    if shape[1] % EIGHT:
        return f"its {shape[1]} inputs are no multiple of {EIGHT}"
    return ""


def check_stored(parts: HqqParts, form: Form, shape: tuple[int, ...]) -> int:
    """Return the count of numbers in a matrix of that shape. Raises ValueError unless its parts fit it."""
    if form.bits not in BITS or form.axis not in (0, 1) or form.group % EIGHT or unfit(form, shape):
        raise ValueError(f"HQQ of {form} has no shape {tuple(shape)}: {unfit(form, shape) or 'there is no such form'}")
    n = math.prod(shape)
    wanted = {name: (dtype, math.prod(size)) for name, (dtype, size) in planes(form.bits, n).items()}
    dtype = parts.scale.dtype
    if dtype not in DTYPES:
        raise ValueError(f"HQQ scale must be bfloat16, float16 or float32, got {dtype}")
    wanted |= {"scale": (dtype, n // form.group), "zero": (dtype, n // form.group)}
    for name, (want, numel) in wanted.items():
        tensor = getattr(parts, name)
        if tensor is None or tensor.dtype != want or tensor.numel() != numel or not tensor.is_contiguous():
            got = "none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"HQQ {name} for shape {tuple(shape)} must be {numel} contiguous {want}, got {got}")
        if tensor.device != parts.codes.device:
            raise ValueError(f"HQQ {name} must be on {parts.codes.device} like its codes, got {tensor.device}")
    return n
