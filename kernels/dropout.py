"""Dropout that keeps a seed instead of a mask: forward and backward draw the same numbers again.

    dropped = x * keep / (1 - p)        keep[i] = whether the i-th random number of `seed` is at least p

The mask of an adapter's input is as large as the input, and kept over a whole step would cost as much memory as the
activations that checkpointing frees. Drawing is a function of (seed, position) alone: Philox on a GPU (Salmon et al.
2011), PyTorch's own generator elsewhere, so a seed gives other masks on other devices but always the same on one.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty_like, launch, on_triton, tl, triton


def dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """A new tensor: x (contiguous), each number zero with probability p, else divided by 1 - p. Outside autograd."""
    return _run(x, p, seed, None)


def dropout_add_(target: torch.Tensor, x: torch.Tensor, p: float, seed: int) -> None:
    """target += dropout(x, p, seed), in place; both contiguous, of one shape and dtype. Outside autograd."""
    if target.shape != x.shape or target.dtype != x.dtype or not target.is_contiguous():
        raise ValueError(f"target must be contiguous {x.dtype} {tuple(x.shape)}, got {target.dtype} {target.shape}")
    _run(x, p, seed, target)


def _run(x: torch.Tensor, p: float, seed: int, target: torch.Tensor | None) -> torch.Tensor:
    if not 0 <= p < 1:
        raise ValueError(f"p must be at least 0 and below 1, got {p}")
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got {tuple(x.shape)} with strides {x.stride()}")
    out = empty_like(x) if target is None else target
    if not on_triton(x):
        generator = torch.Generator(x.device).manual_seed(seed)
        keep = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device) >= p
        dropped = x * keep / (1 - p)
        return out.copy_(dropped) if target is None else out.add_(dropped)
    n = x.numel()
    if n:
        launch(_dropout_kernel, (cdiv(n, 1024),), x, out, n, p, 1 / (1 - p), seed, ADD=target is not None, TILE=1024)
    return out


@triton.jit
def _dropout_kernel(x_ptr, out_ptr, n, p, grow, seed, ADD: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # 74,899 tokens of 28,672 numbers are 2^31
    live = at < n
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    y = tl.where(tl.rand(seed, at) >= p, x * grow, 0.0)
    if ADD:
        y += tl.load(out_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=live)


@cost_of(_dropout_kernel)
def _cost(x: torch.Tensor, *_: Any, ADD: bool, **__: Any) -> Cost:
    return Cost(bytes=(3 if ADD else 2) * x.nbytes)
