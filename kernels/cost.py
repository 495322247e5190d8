"""What kernels cost, counted where a step runs on the meta device; on a GPU nothing of this is called.

Each Triton kernel has its cost registered beside it (`cost_of`), as a function of the very arguments that it is
launched with. So a launch carries no cost along, which a host that launches a hundred kernels a block would pay for,
and a kernel without one cannot be counted: that is an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one kernel or of many."""

    forward: float = 0.0  # FLOPs of matmuls by a transposed weight, as forward has them
    backward: float = 0.0  # FLOPs of matmuls by a weight as it is stored
    attention: float = 0.0  # FLOPs of attention's forward
    attention_backward: float = 0.0  # FLOPs of attention's backward
    skinny: float = 0.0  # FLOPs of matmuls one of whose sizes is an adapter's rank
    skinny_bytes: float = 0.0  # bytes that these read and write
    bytes: float = 0.0  # bytes that elementwise kernels read and write
    dequantized: float = 0.0  # bytes of weights read as stored and written as numbers
    launches: float = 0.0  # by the host: kernels and PyTorch's operators

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in NAMES))

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) - getattr(other, name) for name in NAMES))


NAMES = tuple(field.name for field in fields(Cost))
CostFunction = Callable[..., Cost]
_costs: dict[int, CostFunction] = {}  # of a kernel, by its id: kernels live as long as the program
_listener: Callable[[Cost], None] | None = None


def cost_of(*kernels: Any) -> Callable[[CostFunction], CostFunction]:
    """Register a function of their launch's arguments as the cost of some kernels."""

    def register(cost: CostFunction) -> CostFunction:
        _costs.update({id(kernel): cost for kernel in kernels})
        return cost

    return register


def count_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Tell the listener, if there is one, what a launch with these arguments costs."""
    if _listener is not None:
        _listener(replace(_costs[id(kernel)](*args, **options), launches=1))


def count(cost: Cost) -> None:
    """Tell the listener, if there is one, of work that is no launch of a Triton kernel."""
    if _listener is not None:
        _listener(cost)


@contextmanager
def listening(listener: Callable[[Cost], None]) -> Iterator[None]:
    """Within it `listener` is told what each kernel would cost that is not run, on the meta device."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
