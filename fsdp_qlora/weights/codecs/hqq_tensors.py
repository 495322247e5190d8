"""The tensors of a weight in a checkpoint that hqq saved, or transformers 4 with its HqqConfig.

Both save the state of an `HQQLinear`: W_q, scale and zero, and beside them one small tensor for each setting. Here W_q
goes by the name of the weight, as bitsandbytes calls its codes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.hqq_format import BITS, EIGHT, Form
from fsdp_qlora.weights.codecs.finite import all_finite

WEIGHT, CODES = ".weight", ".W_q"
# The settings that are read, then those that say nothing about the numbers.
SETTINGS = ("nbits", "group_size", "axis", "shape", "packing", "quant_scale", "quant_zero")  # that tell the form
READ = ("scale", "zero", "view_as_float", *SETTINGS)
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
    # None: linears of this kind are not quantized.
    forms = {tag: _form_of(kind) for tag, kind in kinds.items() if kind is not None}
    return None if None in forms.values() else {tag: form for tag, form in forms.items() if form is not None}


def _form_of(kind: Any) -> Form | None:
    weights = kind.get("weight_quant_params") if isinstance(kind, dict) else None
    if not isinstance(weights, dict):
        return None
    bits, group, axis = (weights.get(name) for name in ("nbits", "group_size", "axis"))
    if type(bits) is not int or type(group) is not int or type(axis) is not int:  # nor true and false
        return None
    return Form(bits, group, axis) if bits in BITS and _can_be_read(group, axis) else None


def _can_be_read(group: float, axis: float) -> bool:
    return axis in (0, 1) and group > 0 and group % EIGHT == 0


def tag_of(weight: str) -> str:
    """Return the kind of a weight's linear as hqq and transformers tell kinds apart: its path within its layer."""
    path = weight.removesuffix(WEIGHT).split(".")
    return ".".join(name for name in path if name not in ("model", "layers") and not name.isnumeric())


def describe(weight: str, tensors: Mapping[str, Tensor]) -> Described:
    """Return the form and shape of a weight. Raises UserError for a form that cannot be read here."""
    bits, group, axis = (_number(weight, name, tensors) for name in ("nbits", "group_size", "axis"))
    packing = bytes(_row(weight, "packing", tensors, is_fine=lambda letter: 0 <= letter < 256)).decode(errors="replace")
    if bits not in BITS or PACKINGS[int(bits)] != packing:
        raise UserError(
            f"{weight} in the checkpoint has {bits:g} bits packed as {packing}; hqq's "
            f"{', '.join(map(str, BITS[:-1]))} and {BITS[-1]} bits alone can be read here"
        )
    if not _can_be_read(group, axis):
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
    shape = _row(weight, "shape", tensors, is_fine=lambda size: size > 0)
    return Described(Form(int(bits), int(group), int(axis)), tuple(shape))


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


def floats_of(
    weight: str, name: str, tensors: Mapping[str, Tensor], described: Described, dtype: torch.dtype
) -> Tensor:
    """Return its scales or zeros: [n / group], rounded to `dtype`. Raises UserError where it cannot hold them."""
    found, groups = _get(weight, name, tensors), described.shape[0] * described.shape[1] // described.form.group
    if not found.is_floating_point() or found.numel() != groups:
        raise UserError(
            f"{weight} in the checkpoint: {name} is {tuple(found.shape)} {found.dtype}, not {groups} floating-point "
            "numbers"
        )
    if not all_finite(found):
        raise UserError(
            f"{companion(weight, name)} in the checkpoint holds NaN or infinity: it is damaged, download it again"
        )
    rounded = found.to(dtype).reshape(-1)
    if not all_finite(rounded):
        raise UserError(
            f"precision: {companion(weight, name)} in the checkpoint has numbers beyond the largest of {dtype}, "
            f"{torch.finfo(dtype).max:g}; use --precision bf16 or fp32"
        )
    return rounded


def _get(weight: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    full = companion(weight, name) if name else weight
    if full not in tensors:
        missing = full if name else companion(weight, CODES[1:])
        raise UserError(f"{missing} is missing from the checkpoint: {weight} cannot be read without it")
    return tensors[full]


def _number(weight: str, name: str, tensors: Mapping[str, Tensor]) -> float:
    found = _get(weight, name, tensors)
    if found.numel() != 1 or found.is_complex():
        raise UserError(f"{companion(weight, name)} in the checkpoint is no single number: the file is damaged")
    return float(found.item())


def _row(weight: str, name: str, tensors: Mapping[str, Tensor], is_fine: Callable[[int], bool]) -> list[int]:
    """Return the whole numbers of a setting that is a row of them."""
    found = _get(weight, name, tensors)
    if found.dim() == 1 and not found.is_floating_point() and not found.is_complex():
        numbers: list[int] = found.tolist()
        if all(map(is_fine, numbers)):
            return numbers
    raise UserError(
        f"{companion(weight, name)} in the checkpoint is {tuple(found.shape)} {found.dtype} and not what hqq saves: "
        "the file is damaged"
    )
