"""What kernels that decode weights write to: rows that may lie apart, each times a factor if wanted."""

from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that weights are decoded to


def check_out(out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, codec: str) -> None:
    """Raise ValueError unless `out` can hold numbers of that shape and dtype. codec: its name, for the message."""
    if dtype not in DTYPES:
        raise ValueError(f"{codec} decodes to bfloat16, float16 or float32, got {dtype}")
    if out is not None:
        apart = out.ndim == 2 and out.stride(1) == 1 and out.stride(0) >= out.shape[1]
        if out.shape != torch.Size(shape) or out.dtype != dtype or not (apart or out.is_contiguous()):
            raise ValueError(
                f"out must be {tuple(shape)} {dtype}, contiguous but for a distance between its rows, "
                f"got {tuple(out.shape)} {out.dtype} with strides {out.stride()}"
            )


def row_form(out: torch.Tensor, factor: torch.Tensor | None) -> tuple[int, dict[str, Any]]:
    """Return the out_stride of a decoding kernel, and its APART, I and FACTOR.

    APART is 0 where out is contiguous, 8 where width and stride are multiples of 8 and the stride is counted in
    eights, else 1. factor: of each row, or None. Raises ValueError for a factor that is not [O], contiguous."""
    scaled = factor is not None
    if factor is not None and (factor.shape != out.shape[:1] or not factor.is_contiguous()):
        raise ValueError(f"factor must be contiguous [{out.shape[0]}], got {tuple(factor.shape)} {factor.stride()}")
    if out.is_contiguous():
        return 0, {"APART": 0, "I": out.shape[1] if scaled else 1, "FACTOR": scaled}
    stride, width = out.stride(0), out.shape[1]
    apart = 1 if stride % 8 or width % 8 else 8
    return stride // apart, {"APART": apart, "I": width, "FACTOR": scaled}
