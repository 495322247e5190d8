"""The libraries that quantize, each imported where a run first encodes by it: a run that quantizes nothing needs none.

Their imports prepare `torch.compile` of functions that are not used here, and with that all of TorchInductor: of
bitsandbytes 0.9 s of 1.0 on a fast host, most of four on a slow one, of hqq half of 2.5. Hence the switch around them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def _without_compiler() -> Iterator[None]:
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


@cache
def bitsandbytes_quantizers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return bitsandbytes' `quantize_4bit`, and `quantize_blockwise`, which is for its scales."""
    with _without_compiler():
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise
    return quantize_4bit, quantize_blockwise


@cache
def hqq_step() -> Callable[..., Any]:
    """Return a step of hqq's optimizer: W, scale, zero, [least, most], beta, norm, axis -> (W', codes, zero, scale)."""
    with _without_compiler():
        from hqq.core.optimize import optimize_weights_proximal_legacy_step
    step: Callable[..., Any] = optimize_weights_proximal_legacy_step
    return step
