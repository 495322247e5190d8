"""Where a block's frozen bytes live and how they reach the device that computes: on every rank, or sharded by FSDP2.

Adapters are no concern of a placement: they are small, every rank has them (see shards.py), and FSDP2 is told to ignore
them.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fsdp_qlora.config import MemoryOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.host_buffers import page_lock
from fsdp_qlora.model import CausalModel, Unit
from fsdp_qlora.world import World

PREFETCH = 2  # blocks gathered ahead: one crosses from the host while the one before it is being gathered


class Placement(Protocol):
    """`shards` ranks hold one copy of the frozen bytes between them; `prepare` before loading, `store` each unit."""

    name: str
    shards: int

    def prepare(self, model: CausalModel) -> None: ...

    def store(self, unit: Unit, whole: Tensor) -> None:
        """Put a unit's bytes (uint8 [nbytes] on the device, the placement's to keep) where they belong."""
        ...

    def bytes_here(self, unit: Unit) -> int:
        """The bytes of `unit` that this rank must hold, by the placement's promise."""
        ...


class Replicated:
    """Every rank has everything: no traffic in a step, and a card must hold the whole base."""

    name = "ddp: the frozen base on every rank"
    shards = 1

    def prepare(self, model: CausalModel) -> None:
        pass

    def store(self, unit: Unit, whole: Tensor) -> None:
        _keep_whole(unit, whole)

    def bytes_here(self, unit: Unit) -> int:
        return unit.frozen.layout.nbytes


class Sharded:
    """FSDP2: 1/shards of each unit's bytes on each rank, on its GPU or in its host memory, gathered ahead of use.

    reshard: whether a block is freed between its forward and its backward (full_shard) or stays gathered
    (shard_grad_op).
    replicas: with hybrid sharding, the number of groups of `shards` ranks that each hold a whole copy.
    """

    def __init__(self, world: World, reshard: bool, shards: int, offload: bool) -> None:
        self.shards, self.reshard, self.device = shards, reshard, world.device
        replicas = world.size // shards
        self.pin = offload and world.device.type == "cuda"
        self.offload = offload
        kind = world.device.type
        if replicas == 1:
            self.mesh = init_device_mesh(kind, (shards,))
        else:
            self.mesh = init_device_mesh(kind, (replicas, shards), mesh_dim_names=("replica", "shard"))
        self.index = self.mesh.get_local_rank(self.mesh.ndim - 1)
        where = "in host memory" if offload else "on the GPU" if kind == "cuda" else "in memory"
        self.name = f"FSDP2: each rank has 1/{shards} of the frozen base {where}, gathered {PREFETCH} blocks ahead" + (
            "" if reshard else ", kept from forward to backward"
        )

    def prepare(self, model: CausalModel) -> None:
        policy = CPUOffloadPolicy(pin_memory=self.pin) if self.offload else OffloadPolicy()
        trainable = {p for p in model.parameters() if p.requires_grad}
        replicated = {p for u in model.units if u.home != "shared" for p in u.frozen.parameters()}

        def shard(module: nn.Module, reshard: bool) -> None:
            fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=reshard,
                offload_policy=policy,
                ignored_params=trainable | replicated,
            )

        # The blocks by FSDP2's own hooks; embedding and head by hand (`FrozenBytes.opened`), since nothing of theirs is
        # needed in backward, where a hook would gather them again.
        blocks = list(model.blocks.values())
        for block in blocks:
            shard(block, self.reshard)
        for unit in model.units:
            if unit.home == "shared" and unit.name not in model.blocks:
                shard(unit.frozen, True)
        shard(model, False)  # the root: starts and ends each pass, and holds no bytes of its own
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + PREFETCH])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - PREFETCH) : i][::-1])

    def store(self, unit: Unit, whole: Tensor) -> None:
        if unit.home != "shared":
            _keep_whole(unit, whole)
            return
        length = whole.numel() // self.shards
        mine = whole[self.index * length : (self.index + 1) * length].view(torch.float32)
        with torch.no_grad():
            shard = torch.empty_like(unit.frozen.flat, device="cpu" if self.offload else self.device)
            assert isinstance(shard, DTensor), "`prepare` makes it one"
            local = shard.to_local()
            if self.pin:
                page_lock(local, "use_cpu_offload")
            local.copy_(mine)
        unit.frozen.load_state_dict({"flat": nn.Parameter(shard, requires_grad=False)}, assign=True)

    def bytes_here(self, unit: Unit) -> int:
        return unit.frozen.layout.nbytes // (self.shards if unit.home == "shared" else 1)


def choose_placement(options: MemoryOptions, world: World) -> Placement:
    """The placement of `--sharding_strategy` and `--use_cpu_offload`. Raises UserError if the ranks do not divide."""
    strategy, offload = options.sharding_strategy, options.use_cpu_offload
    if strategy == "ddp" or (world.size == 1 and not offload):
        return Replicated()
    shards = world.size
    if strategy.startswith("hybrid"):
        shards = world.local_size if options.hybrid_shard_size == -1 else options.hybrid_shard_size
        if world.size % shards:
            raise UserError(
                f"hybrid_shard_size: {world.size} ranks cannot be divided into groups of {shards}; "
                "use a divisor of the number of ranks"
            )
    return Sharded(world, reshard=strategy.endswith("full_shard"), shards=shards, offload=offload)


def _keep_whole(unit: Unit, whole: Tensor) -> None:
    """This rank keeps all of a unit's bytes, on the device or in page-locked host memory as the unit has it."""
    if unit.home == "host" and whole.is_cuda:
        whole = page_lock(torch.empty_like(whole, device="cpu"), "the embedding").copy_(whole)
    unit.frozen.flat = nn.Parameter(whole.view(torch.float32), requires_grad=False)


def held_bytes(unit: Unit) -> int:
    """The bytes of `unit` that this rank really holds now, outside a pass."""
    flat = unit.frozen.flat
    local = flat.to_local() if isinstance(flat, DTensor) else flat
    return local.untyped_storage().nbytes()


def check_bytes(model: CausalModel, placement: Placement) -> None:
    """Assert that each unit takes what the placement promises on this rank."""
    for unit in model.units:
        held, promised = held_bytes(unit), placement.bytes_here(unit)
        assert held == promised, f"{unit.name}: {held} bytes on rank {dist.get_rank()}, {promised} promised"
