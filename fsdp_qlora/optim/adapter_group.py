"""The adapters of one block: their working copy, this rank's slice of the master weights, their gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from fsdp_qlora.distributed.world import World
from fsdp_qlora.exchange.base import Pending
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.generic_block import Block, FrozenLinear
from fsdp_qlora.optim.master_weights import Masters

BLOCKS_PER_UPDATE = 4  # blocks whose master weights are updated together


@dataclass(eq=False)
class AdapterGroup:
    """The adapters of one block, concatenated and padded to a multiple of the number of ranks."""

    working: Tensor  # compute dtype [padded]; the parameters are views of it
    shard: Tensor  # this rank's slice of `working`, [padded / ranks]
    masters: Masters  # master weights of this rank's slices of a few blocks
    index: int  # of this block among them
    names: list[str] = field(
        default_factory=list
    )  # linear by linear, `path.lora_A` and so on in the order of the adapter's parameters
    params: list[nn.Parameter] = field(default_factory=list)  # as `names`
    linears: list[FrozenLinear] = field(default_factory=list)  # that have them
    # Of this rank's slice, float32 [padded / ranks], from the block's backward to `zero_grad`. Between the passes,
    # where the blocks save most, there is none.
    gradient: Tensor | None = None
    unreduced: Tensor | None = None  # with no_sync: this rank's own sum over micro-batches, float32 [padded]
    n_missing: int = 0  # parameters whose gradient the current backward has not computed yet
    updated: torch.cuda.Event | None = None  # this rank's new values are in `shard`
    gather: Pending | None = None  # of new working values, until a stream has waited for it

    @property
    def master(self) -> nn.Parameter:
        """This rank's master weights. While they are updated they have a gradient, and values in every precision."""
        return self.masters.parameters[self.index]

    def wait(self) -> None:
        """Make the current stream (without a GPU: the caller) wait for the new working values."""
        if self.gather is not None:
            self.gather.wait()
            self.gather = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of flat [padded] that belong to each of `params`, in its shape."""
        views, offset = [], 0
        for p in self.params:
            views.append(flat[offset : offset + p.numel()].view(p.shape))
            offset += p.numel()
        return views

    def named_views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, part of flat [padded]) of each parameter."""
        return zip(self.names, self.views(flat), strict=True)

    def fill(self, flat: Tensor, world: World) -> None:
        """Set all adapters of the block from float32 [padded] on the CPU."""
        self.working.copy_(flat)
        length = flat.numel() // world.size
        own = flat[world.rank * length : (world.rank + 1) * length]
        self.masters.set(self.index, own.to(world.device))
        self.values_change()

    def values_change(self) -> None:
        """Tell the linears that their adapters have new values, or will have once they are gathered."""
        for linear in self.linears:
            linear.values_change()


def make_groups(model: CausalModel, world: World) -> dict[str, AdapterGroup]:
    """Return path -> group, of each block with adapters. Their parameters become the model's; all values are zero."""
    adapted = {path: linears for path, block in model.blocks.items() if (linears := _adapted(path, block))}
    sizes = [
        sum(p.numel() for m in linears.values() for p in m.adapter_parameters().values())
        for linears in adapted.values()
    ]
    buffers = _buffers(sizes, model.precision.compute, world)
    groups = {}
    for (path, linears), (working, masters, index) in zip(adapted.items(), buffers, strict=True):
        groups[path] = AdapterGroup(working, masters.shards[index], masters, index)
        _make_parameters(groups[path], linears)
    return groups


def _buffers(sizes: list[int], dtype: torch.dtype, world: World) -> Iterator[tuple[Tensor, Masters, int]]:
    """Yield (working copy [padded], masters, index in them) of each block. sizes: adapter parameters of each."""
    for size, equal in groupby(sizes):
        padded, blocks = -(-size // world.size) * world.size, len(list(equal))
        for first in range(0, blocks, BLOCKS_PER_UPDATE):
            count = min(BLOCKS_PER_UPDATE, blocks - first)
            working = torch.zeros(count, padded, dtype=dtype, device=world.device)
            masters = Masters(working.view(count, world.size, -1)[:, world.rank])
            # `data`: with a version counter of its own. Gloo's thread writes a block's new values while the forward of
            # a block before it, in the same tensor, saves its adapters for backward, which autograd would refuse.
            yield from ((row.data, masters, i) for i, row in enumerate(working))


def _make_parameters(group: AdapterGroup, linears: dict[str, FrozenLinear]) -> None:
    """Replace the adapters of the linears, on the meta device, by views of the group's working copy."""
    offset = 0
    group.linears = list(linears.values())
    for path, linear in linears.items():
        for name, meta in linear.adapter_parameters().items():
            parameter = nn.Parameter(group.working[offset : offset + meta.numel()].view(meta.shape))
            setattr(linear, name, parameter)
            group.names.append(f"{path}.{name}")
            group.params.append(parameter)
            offset += meta.numel()


def _adapted(path: str, block: Block) -> dict[str, FrozenLinear]:
    """Return path -> linear, of those that have an adapter."""
    return {f"{path}.{name}": linear for name, linear in block.linears().items() if linear.adapter_parameters()}
