"""Which of an op's two forms runs: Triton kernels on a GPU, the plain PyTorch meaning everywhere else.

The choice hangs on the tensor's device alone, so an op asks once, at its door, and never again inside. Triton has no
wheel outside Linux; there its decorators are stand-ins, and every op runs in its plain form. For tests,
`TRITON_INTERPRET=1` in the environment (before this module is imported) together with `interpreting()` sends CPU
tensors through the Triton kernels as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stands where Triton is not: decorating a kernel leaves it alone, and no kernel is ever launched."""

        constexpr = Any

        def jit(self, kernel):
            return kernel

    triton = tl = _Absent()

__all__ = ["INTERPRETER", "cdiv", "interpreting", "next_power_of_2", "on_triton", "tl", "triton"]

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
_interpreting = False


def on_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels."""
    return tensor.is_cuda or _interpreting


# Triton has these two as well, each at more than a microsecond of the host per call: a launch takes ten.
def cdiv(n: int, d: int) -> int:
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it CPU tensors go through Triton's interpreter too. Needs TRITON_INTERPRET=1 set before the import."""
    global _interpreting
    if not INTERPRETER:
        raise RuntimeError("interpreting() needs TRITON_INTERPRET=1 in the environment before kernels are imported")
    _interpreting = True
    try:
        yield
    finally:
        _interpreting = False
