"""Which of an op's two forms runs, how a kernel is launched, and where ops take the memory of what they return.

Triton kernels run on a GPU, the plain PyTorch meaning everywhere else.

The choice hangs on the tensor's device alone, so an op asks once, at its door, and never again inside. Triton has no
wheel outside Linux; there its decorators are stand-ins, and every op runs in its plain form. For tests,
`TRITON_INTERPRET=1` in the environment (before this module is imported) together with `interpreting()` sends CPU
tensors through the Triton kernels as well. On the meta device an op takes the GPU's form and no kernel runs, so that a
step can be run there to see what it allocates and launches.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fsdp_qlora.kernels.cost import count_launch
from fsdp_qlora.kernels.quick_launch import quick_launch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stands where Triton is not: decorating a kernel leaves it alone, and no kernel is ever launched."""

        constexpr = Any

        def jit(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
            return kernel

    triton = tl = _Absent()

__all__ = [
    "INTERPRETER",
    "Source",
    "allocate",
    "cdiv",
    "deterministic",
    "empty",
    "empty_like",
    "interpreting",
    "launch",
    "next_power_of_2",
    "no_autocast",
    "on_triton",
    "take_from",
    "tl",
    "triton",
]

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
_interpreting = False

Source = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]
_source: Source | None = None


def on_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels."""
    return tensor.is_cuda or _interpreting or tensor.is_meta


def deterministic() -> bool:
    """Tell whether PyTorch was told to use deterministic algorithms, and not only to warn of others."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a Triton kernel; on the meta device only count what it would cost. args: its arguments, a tensor first."""
    if args[0].is_meta:
        count_launch(kernel, args, options)
    elif INTERPRETER:
        kernel[grid](*args, **options)
    else:
        quick_launch(kernel, grid, args, options)


def empty(shape: Sequence[int], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an uninitialised contiguous tensor of like's device, and of its dtype where none is given.

    Its memory is the `take_from` source's where one is set, else PyTorch's allocator's."""
    return allocate(shape, like.dtype if dtype is None else dtype, like.device)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `empty` of that dtype and device."""
    if _source is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return _source(tuple(shape), dtype, device)


def empty_like(like: torch.Tensor) -> torch.Tensor:
    """Return `empty` of like's shape."""
    return empty(like.shape, like)


def take_from(source: Source | None) -> None:
    """Let `empty` ask `source` for (shape, dtype, device) from now on, in every thread; None: PyTorch's allocator."""
    global _source
    _source = source


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which ops on this tensor's device keep the dtypes that they are given."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


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
