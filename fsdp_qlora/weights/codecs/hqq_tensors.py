"""The tensors of a weight in a checkpoint that hqq saved, or transformers 4 with its HqqConfig.

Both save the state of an `HQQLinear`: W_q, scale and zero, and beside them one small tensor for each setting. Here W_q
goes by the name of the weight, as bitsandbytes calls its codes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.hqq_format import BITS, EIGHT, Form

WEIGHT, CODES = ".weight", ".W_q"
# The settings that are read, then those that say nothing about the numbers.
READ = (
    "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "view_as_float", "quant_scale", "quant_zero",
)  # fmt: skip
UNREAD = (
    "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
IN_ONE_WORD = 10  # 3-bit codes in an int32


class Described(NamedTuple):
    """What a checkpoint says of a quantized weight."""

    form: Form
    shape: tuple[int, ...]


def companion(weight: str, name: str) -> str:
    """Return the name of another tensor of the weight's linear."""
    return f"{weight.removesuffix(WEIGHT)}.{name}"


def declared(quantization_config: Mapping[str, Any]) -> dict[str, Form] | None:
    """Return the forms that a config.json of transformers' HqqConfig declares, by kind of linear (`tag_of`).

    One form for all is that of the kind ''. None for another method than HQQ, and for a form that cannot be read."""
    settings = quantization_config.get("quant_config")
    if quantization_config.get("quant_method") != "hqq" or not isinstance(settings, dict):
        return None
    kinds = {"": settings} if "weight_quant_params" in settings else settings
    forms = {}
    for tag, kind in kinds.items():
        if kind is None:  # linears of this kind are not quantized
            continue
        weights = kind.get("weight_quant_params") or {}
        bits, group, axis = (weights.get(name) for name in ("nbits", "group_size", "axis"))
        if bits not in BITS or not isinstance(group, int) or axis not in (0, 1):
            return None
        forms[tag] = Form(bits, group, axis)
    return forms


def tag_of(weight: str) -> str:
    """Return the kind of a weight's linear as hqq and transformers tell kinds apart: its path within its layer."""
    path = weight.removesuffix(WEIGHT).split(".")
    return ".".join(name for name in path if name not in ("model", "layers") and not name.isnumeric())


def describe(weight: str, tensors: Mapping[str, Tensor]) -> Described:
    """Return the form and shape of a weight. Raises UserError for a form that cannot be read here."""
    bits, group, axis = (_number(weight, name, tensors) for name in ("nbits", "group_size", "axis"))
    packing = "".join(chr(letter) for letter in _get(weight, "packing", tensors).tolist())
    if bits not in BITS or PACKINGS[int(bits)] != packing:
        raise UserError(
            f"{weight} in the checkpoint has {bits:g} bits packed as {packing}; hqq's "
            f"{', '.join(map(str, BITS[:-1]))} and {BITS[-1]} bits alone can be read here"
        )
    if axis not in (0, 1) or group <= 0 or group % EIGHT:
        raise UserError(
            f"{weight} in the checkpoint has groups of {group:g} along axis {axis:g}; multiples of {EIGHT} along axis "
            "0 or 1 alone can be read here"
        )
    for name in ("quant_scale", "quant_zero"):
        if _number(weight, name, tensors):
            raise UserError(
                f"{weight} in the checkpoint has its scales or zeros quantized too, which hqq itself has given up: "
                "quantize the model anew"
            )
    shape = tuple(int(size) for size in _get(weight, "shape", tensors).tolist())
    return Described(Form(int(bits), int(group), int(axis)), shape)


def codes_of(weight: str, tensors: Mapping[str, Tensor], described: Described) -> Tensor:
    """Return the codes in the order of the matrix: uint8 [n]."""
    form, shape = described
    packed = _get(weight, "", tensors)
    if _number(weight, "view_as_float", tensors) or packed.is_floating_point():
        packed = packed.contiguous().view(torch.int32 if form.bits == 3 else torch.uint8)
    n = shape[0] * shape[1]
    height, width = (n // form.group, form.group) if form.axis == 1 else (form.group, n // form.group)
    count = IN_ONE_WORD if form.bits == 3 else 8 // form.bits
    wanted, dtype = (-(-height // count), width), torch.int32 if form.bits == 3 else torch.uint8
    if tuple(packed.shape) != wanted or packed.dtype != dtype:
        raise UserError(
            f"{weight} in the checkpoint: W_q is {tuple(packed.shape)} {packed.dtype}, not {wanted} {dtype}"
        )
    mask = (1 << form.bits) - 1
    # Stripe after stripe of the rows, from the highest bits to the lowest.
    stripes = [(packed >> (form.bits * (count - 1 - i)) & mask).to(torch.uint8) for i in range(count)]
    return torch.cat(stripes)[:height].reshape(-1)


def floats_of(weight: str, name: str, tensors: Mapping[str, Tensor], described: Described) -> Tensor:
    """Return its scales or zeros as they are stored: [n / group]."""
    found, groups = _get(weight, name, tensors), described.shape[0] * described.shape[1] // described.form.group
    if not found.is_floating_point() or found.numel() != groups:
        raise UserError(
            f"{weight} in the checkpoint: {name} is {tuple(found.shape)} {found.dtype}, not {groups} floating-point "
            "numbers"
        )
    return found.reshape(-1)


def _get(weight: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    full = companion(weight, name) if name else weight
    if full not in tensors:
        missing = full if name else companion(weight, CODES[1:])
        raise UserError(f"{missing} is missing from the checkpoint: {weight} cannot be read without it")
    return tensors[full]


def _number(weight: str, name: str, tensors: Mapping[str, Tensor]) -> float:
    found = _get(weight, name, tensors)
    if found.numel() != 1:
        raise UserError(f"{companion(weight, name)} in the checkpoint is no single number: the file is damaged")
    return float(found.item())
