"""The NF4 format: levels, scales, and what a stored tensor must look like.

NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314; as bitsandbytes stores it). A tensor is read as one flat run
of n numbers. Byte i holds numbers 2i (high nibble) and 2i+1 (low nibble), each an index into 16 fixed levels. Every 64
numbers share one float32 scale, so

    number = round_to_dtype(LEVELS[code] * scale)                          one float32 product, one rounding

With double quantization the scales are themselves 8-bit indices into a fixed 256-entry map, 256 of them sharing one
float32, all shifted by one offset:

    scale = (MAP[index] * nested_absmax) + offset                          two float32 roundings, never one fused
"""

import math

import torch

BLOCK = 64  # numbers that share a scale
NESTED_BLOCK = 256  # scales that share a nested scale
Scales = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Quantiles of a normal distribution, scaled to [-1, 1] and with an exact zero (QLoRA, appendix E).
# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def dynamic_map() -> torch.Tensor:
    """The 256 levels of the 8-bit scales: float32 [256], ascending, on the CPU.

    Dettmers, "8-bit approximations for parallelism in deep learning" (arXiv 1511.04561): seven decades, 1e-6 to 1, and
    each decade up twice as many evenly spread levels as the one below; both signs, 0 and 1.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        decades.append(10 ** (decade - 6) * centres)
    positive = torch.cat(decades)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


def check_stored(codes: torch.Tensor, absmax: Scales, shape: tuple[int, ...]) -> int:
    """Return the count of numbers in a tensor of that shape. Raises ValueError unless its parts fit it."""
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    parts = [("codes", codes, torch.uint8, -(-n // 2))]
    if isinstance(absmax, torch.Tensor):
        parts.append(("absmax", absmax, torch.float32, blocks))
    else:
        parts.append(("absmax indices", absmax[0], torch.uint8, blocks))
        parts.append(("nested absmax", absmax[1], torch.float32, -(-blocks // NESTED_BLOCK)))
        parts.append(("offset", absmax[2], torch.float32, 1))
    for name, tensor, want, numel in parts:
        if tensor.dtype != want or tensor.numel() != numel or not tensor.is_contiguous():
            raise ValueError(
                f"NF4 {name} for shape {tuple(shape)} must be {numel} contiguous {want}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != codes.device:
            raise ValueError(f"NF4 {name} must be on {codes.device} like its codes, got {tensor.device}")
    return n
