"""The state of an optimizer as named tensors of each block, and back: on as many ranks as before, or on others.

Each rank gives its own slices. All that is a value for each master weight (PyTorch's optimizers, bitsandbytes' in 32
bits) is joined and cut anew for another number of ranks. bitsandbytes' 8-bit state has one scale for each 256 values of
a slice and belongs to these slices alone (`OptimizerSpec.is_blockwise`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fsdp_qlora.optim.adapter_group import AdapterGroup

Read = Callable[[str, AdapterGroup], Tensor]  # of (`block.name`, its group): this rank's slice, on the CPU


def named_state(optimizer: Optimizer, groups: Mapping[str, AdapterGroup]) -> Iterator[tuple[str, Tensor]]:
    """Yield (`block.name`, tensor) of all that this rank's slices have; numbers as tensors without dimensions.

    groups: by the path of their block."""
    for path, group in groups.items():
        for name, value in sorted(optimizer.state.get(group.master, {}).items()):
            if value is not None:
                yield f"{path}.{name}", value if isinstance(value, Tensor) else torch.tensor(value)


def load_named_state(
    optimizer: Optimizer, groups: Mapping[str, AdapterGroup], names: Iterable[str], read: Read
) -> None:
    """Give this rank's slices the state that has these names; a slice without any gets its first state in its first
    update."""
    of_block: dict[str, list[str]] = {path: [] for path in groups}
    for full in names:
        path, _, name = full.rpartition(".")
        of_block[path].append(name)
    for path, found in of_block.items():
        if found:
            _load_slice(optimizer, groups[path], {name: read(f"{path}.{name}", groups[path]) for name in found})


def slice_of(parts: Sequence[Callable[[int, int], Tensor]], size: int, length: int, rank: int) -> Tensor:
    """Return slice `rank`, [length], of a flat buffer [size] that is in equal parts; zeros beyond its end.

    parts: each gives its values from a first to a last one."""
    each = -(-size // len(parts))
    start, stop = min(rank * length, size), min((rank + 1) * length, size)
    pieces = [
        part(max(start, first) - first, min(stop, first + each) - first)
        for first, part in zip(range(0, each * len(parts), each), parts, strict=True)
        if max(start, first) < min(stop, first + each)
    ]
    found = torch.cat(pieces) if pieces else torch.zeros(0)
    return torch.cat([found, found.new_zeros(length - len(found))])


def _load_slice(optimizer: Optimizer, group: AdapterGroup, values: dict[str, Tensor]) -> None:
    master = group.master
    if not hasattr(optimizer, "init_state"):
        optimizer.state[master] = {name: _placed(value, master, optimizer) for name, value in values.items()}
        return
    # bitsandbytes makes its state, part of it in pages, by the parameter's size, which is 0 except while it is updated.
    group.masters.unfold()
    number = next(i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p is master)
    optimizer.init_state(optimizer.param_groups[0], master, 0, number)
    group.masters.fold()
    made = optimizer.state[master]
    for name, value in made.items():
        if isinstance(value, Tensor):
            value.copy_(values[name])
        else:
            made[name] = type(value)(values[name].item())


def _placed(value: Tensor, master: nn.Parameter, optimizer: Optimizer) -> Tensor:
    """Return a value where PyTorch's optimizers keep it: counters in host memory, unless their kernel is fused."""
    counts_on_host = value.dim() == 0 and not optimizer.param_groups[0].get("fused")
    # A copy: what a file gave may be the file itself, mapped into memory.
    return value.clone() if counts_on_host else value.to(master.device, copy=True)
