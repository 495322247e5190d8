"""Copies of saved tensors, so that the larger memory that they are views of can be released."""

from typing import TypeVar

from torch import Tensor

from fsdp_qlora.kernels.attention import Stats
from fsdp_qlora.kernels.device import deterministic, empty, empty_like

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def own(x: MaybeTensor) -> MaybeTensor:
    """Return a contiguous copy."""
    return None if x is None else empty_like(x).copy_(x)


def own_stats(stats: Stats) -> Stats:
    """Return attention's statistics with its row sums copied; the few integers among them stay as they are."""
    if isinstance(stats, Tensor):
        if not stats.is_floating_point():
            return stats
        return empty((stats.numel(), 1), stats).view(stats.shape).copy_(stats)  # a last axis that no length changes
    return tuple(own_stats(stat) for stat in stats) if isinstance(stats, list | tuple) else stats


def as_saved(x: MaybeTensor) -> MaybeTensor:
    """Return x with the strides that it has where it was saved, if bits shall not depend on that: for matrices of other
    strides cuBLAS may take another kernel, which sums in another order."""
    return own(x) if deterministic() else x


def whole_rows(x: Tensor) -> Tensor:
    """Return x as one contiguous piece: itself, or x [T, C] with what follows each row (`lora_wide.wide`)."""
    return x if x.is_contiguous() else x.as_strided((x.shape[0], x.stride(0)), (x.stride(0), 1))
