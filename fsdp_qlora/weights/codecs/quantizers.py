"""The libraries that quantize, imported where a run first encodes by them: a run that quantizes nothing needs none."""

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def bitsandbytes_quantizers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return bitsandbytes' `quantize_4bit`, and `quantize_blockwise`, which is for its scales."""
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    return quantize_4bit, quantize_blockwise


@cache
def hqq_step() -> Callable[..., Any]:
    """Return a step of hqq's optimizer: W, scale, zero, [least, most], beta, norm, axis -> (W', codes, zero, scale)."""
    from hqq.core.optimize import optimize_weights_proximal_legacy_step

    step: Callable[..., Any] = optimize_weights_proximal_legacy_step
    return step
