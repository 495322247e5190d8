"""Values of all adapters by name: drawn, loaded, gathered from the master weights, or read off the working copies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from fsdp_qlora.adapters.base import AdapterKind
from fsdp_qlora.distributed.world import World
from fsdp_qlora.exchange.base import Exchange
from fsdp_qlora.optim.adapter_group import AdapterGroup
from fsdp_qlora.runtime.launcher import usable_cores

DRAWING_THREADS = 8  # at most


def draw_values(
    groups: Sequence[AdapterGroup], kind: AdapterKind, seed: int, world: World, norms: Mapping[str, Tensor]
) -> None:
    """Give every adapter its first values. Threads draw them, a few blocks at a time.

    norms: of the base's rows, by linear, where the kind reads them."""
    count = max(1, min(DRAWING_THREADS, usable_cores(None) // world.local_size))
    with ThreadPoolExecutor(count) as pool:
        for first in range(0, len(groups), count):
            some = groups[first : first + count]
            for group, flat in zip(some, pool.map(lambda group: _drawn(group, kind, seed, norms), some), strict=True):
                group.fill(flat, world)


def load_values(groups: Sequence[AdapterGroup], read: Callable[[str], Tensor], world: World) -> None:
    """Set every adapter to what `read` gives for its name: `path.lora_A` -> matrix."""
    for group in groups:
        flat = torch.zeros(group.working.numel(), dtype=torch.float32)
        for name, view in group.named_views(flat):
            view.copy_(read(name))
        group.fill(flat, world)


def gather_blocks(
    groups: Sequence[AdapterGroup], exchange: Exchange, world: World
) -> Iterator[tuple[AdapterGroup, Tensor]]:
    """Yield (group, its whole float32 master weights [padded], on the device) of each block. A collective for each."""
    for group in groups:
        whole = torch.empty(group.working.numel(), dtype=torch.float32, device=world.device)
        if world.size == 1:
            whole.copy_(group.masters.values(group.index))
        else:
            exchange.all_gather(whole, group.masters.values(group.index)).wait()
        yield group, whole


def gather_masters(groups: Sequence[AdapterGroup], exchange: Exchange, world: World) -> dict[str, Tensor]:
    """Return `path.lora_A` -> the whole float32 master matrix, on the CPU of every rank. A collective."""
    tensors: dict[str, Tensor] = {}
    for group, whole in gather_blocks(groups, exchange, world):
        tensors |= _named_copies(group, whole.cpu())
    return tensors


def copy_working(groups: Sequence[AdapterGroup], device: torch.device) -> dict[str, Tensor]:
    """Return `path.lora_A` -> matrix of this rank's working copy, on the CPU.

    The copies run on a stream of their own, behind nothing that the computing stream may wait for."""
    tensors: dict[str, Tensor] = {}
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
        for group in groups:
            tensors |= _named_copies(group, group.working.detach().cpu())
    return tensors


def _drawn(group: AdapterGroup, kind: AdapterKind, seed: int, norms: Mapping[str, Tensor]) -> Tensor:
    """Return the first values of a block's adapters, float32 [padded] on the CPU."""
    flat = torch.zeros(group.working.numel())
    for name, view in group.named_views(flat):
        path, _, parameter = name.rpartition(".")
        kind.initialize(view, path, parameter, seed, norms.get(path))
    return flat


def _named_copies(group: AdapterGroup, flat: Tensor) -> dict[str, Tensor]:
    return {name: view.clone() for name, view in group.named_views(flat)}
