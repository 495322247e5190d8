"""Where a block's frozen bytes live and how they reach the device that computes.

Whole on every rank's device, sharded by FSDP2, or streamed from one copy in host memory. Adapters are no concern of a
placement: they are small, every rank has them (see optim/sharded_adapters.py), and FSDP2 is told to ignore them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.shards import shard_count
from fsdp_qlora.distributed.world import World
from fsdp_qlora.memory.pinned import page_lock
from fsdp_qlora.memory.shared import HostStore, rounded
from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement.streamer import Stop, Streamer
from fsdp_qlora.plan.plan import Plan

PREFETCH = 2  # blocks gathered ahead: one crosses from the host while the one before it is being gathered


class Placement(Protocol):
    """Where the frozen bytes are kept: `prepare` before loading, `store` each unit, `finish` after the last."""

    def prepare(self, model: CausalModel) -> None: ...

    def store(self, unit: Unit, whole: Tensor) -> None:
        """Put a unit's bytes (uint8 [nbytes] on the device, the placement's to keep) where they belong."""
        ...

    def finish(self) -> None:
        """All is stored. A collective."""
        ...

    def bytes_here(self, unit: Unit) -> int:
        """The bytes of `unit` that this rank must hold, by the placement's promise."""
        ...

    def shrink(self, plan: Plan) -> None:
        """Hold no more of the base on the device than `plan` says, which is less. Called between steps, a collective.

        Raises UserError on every rank where host memory for it cannot be had; all is as before then."""
        ...


class Residents:
    """The bytes of blocks that stay on the device, all allocated when the first is stored: between the memory that
    loading takes and gives back they would leave holes. A piece each, so that a block can leave (`Streamed.shrink`)."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.names = {unit.name for unit in units}
        self._nbytes = {unit.name: unit.frozen.layout.nbytes for unit in units}
        self._pieces: dict[str, Tensor] | None = None  # of blocks to come

    def store(self, unit: Unit, whole: Tensor) -> None:
        if self._pieces is None:
            made = {name: torch.empty(n, dtype=torch.uint8, device=whole.device) for name, n in self._nbytes.items()}
            self._pieces = made
        piece = self._pieces.pop(unit.name, None)
        piece = whole if piece is None else piece.copy_(whole)  # stored before: it keeps what it is given
        unit.frozen.flat = nn.Parameter(piece.view(torch.float32), requires_grad=False)


class Replicated:
    """Every rank has everything: no traffic in a step, and a card must hold the whole base."""

    def prepare(self, model: CausalModel) -> None:
        self._residents = Residents([unit for unit in model.units if unit.name in model.blocks])

    def store(self, unit: Unit, whole: Tensor) -> None:
        if unit.name in self._residents.names:
            self._residents.store(unit, whole)
        else:
            _keep_whole(unit, whole)

    def finish(self) -> None:
        pass

    def bytes_here(self, unit: Unit) -> int:
        return unit.frozen.layout.nbytes

    def shrink(self, plan: Plan) -> None:
        pass


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

    def finish(self) -> None:
        pass

    def bytes_here(self, unit: Unit) -> int:
        return unit.frozen.layout.nbytes // (self.shards if unit.home == "shared" else 1)

    def shrink(self, plan: Plan) -> None:
        pass


class Streamed:
    """One copy a node in host memory; every rank copies each block to its device ahead of use (see streamer.py).

    resident: the blocks that stay on the device instead. head_resident: whether the head does, or comes as one more
    unit after the last block. An untied embedding stays in the node's copy, where its rows are read one by one; a tied
    one is the head as well and stays on the device, as do vectors. link_rate: of the copies, bytes per second, if it is
    known.
    """

    def __init__(
        self,
        world: World,
        resident: Sequence[bool],
        head_resident: bool,
        buffers: int,
        link_rate: float | None = None,
    ) -> None:
        self.world, self.resident, self.head_resident, self.buffers = world, resident, head_resident, buffers
        self.link_rate = link_rate
        self._sources: dict[str, Tensor] = {}

    def prepare(self, model: CausalModel) -> None:
        self._blocks = list(model.blocks)
        self._order = list(self._blocks)
        if not model.is_tied():  # a tied head is the embedding, which stays on the device
            self._order += [u.name for u in model.units if u.frozen is model.head.frozen]
        self._streamed = {name for name, stays in zip(self._blocks, self.resident, strict=True) if not stays}
        if not self.head_resident and not model.is_tied():
            self._streamed.add(self._order[-1])
        embedding = model.embedding[0].frozen
        in_store = self._streamed | {
            u.name
            for u in model.units
            if u.frozen is embedding and (u.home == "host" or (self.world.device.type == "cpu" and not model.is_tied()))
        }
        self._units = {u.name: u for u in model.units}
        self._residents = Residents([self._units[name] for name in self._blocks if name not in self._streamed])
        self._in_store = in_store
        pieces = [unit.frozen.layout.nbytes for unit in model.units if unit.name in in_store]  # as `store` takes them
        self._stores = [HostStore(sum(map(rounded, pieces)), self.world, pieces=pieces)] if pieces else []

    def store(self, unit: Unit, whole: Tensor) -> None:
        if unit.name in self._residents.names:
            self._residents.store(unit, whole)
            return
        if unit.name not in self._in_store:
            _keep_whole(unit, whole)
            return
        piece = self._write(whole)
        if unit.name in self._streamed:
            self._sources[unit.name] = piece
            return
        readable = not (whole.is_cuda and self._stores[-1].refused)  # the embedding, whose rows the device reads itself
        unit.frozen.flat = nn.Parameter((piece if readable else whole).view(torch.float32), requires_grad=False)

    def finish(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        refused = max((store.refused for store in self._stores), default=0)
        codes = [int(code) for (code,) in self.world.gather([refused])]  # also: every rank has written its part
        if any(codes):
            self.world.say(
                f"the system refuses to page-lock the host copy of the frozen base (CUDA error {max(codes)}): blocks "
                "are copied by way of the driver's own buffers, at about half the speed. Raise `ulimit -l` (memlock) "
                "or the container's limit"
            )
        self._stream()

    def bytes_here(self, unit: Unit) -> int:
        return 0 if unit.name in self._streamed else unit.frozen.layout.nbytes

    def shrink(self, plan: Plan) -> None:
        stays = {name for name, block in zip(self._blocks, plan.blocks, strict=True) if block.resident}
        stays |= {name for name in self._order[len(self._blocks) :] if plan.head_resident}
        leaving = [name for name in self._order if name not in self._streamed | stays]
        if not leaving and plan.staging == self.buffers:
            return
        nbytes = sum(rounded(self._units[name].frozen.layout.nbytes) for name in leaving)
        self._stores += [HostStore(nbytes, self.world)] if nbytes else []
        for name in leaving:
            self._sources[name] = self._write(self._units[name].frozen.flat.detach().view(torch.uint8))
        self.buffers = plan.staging
        self._streamed |= set(leaving)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.world.barrier()  # every rank has written its part
        for name in self._order:
            self._units[name].frozen.bring = None  # and the buffers are gone before there are new ones
            if name in self._streamed:
                self._units[name].frozen.leave()
        self._stream()

    def _write(self, whole: Tensor) -> Tensor:
        """A unit's bytes in the newest store: this rank's share of them is on its way there."""
        piece = self._stores[-1].take(whole.numel())
        mine = self._stores[-1].share(whole.numel())
        piece[mine].copy_(whole[mine], non_blocking=True)
        return piece

    def _stream(self) -> None:
        """Bring what is in host memory when it is needed, from now on."""
        stops = [Stop(self._units[name].frozen, self._sources.get(name)) for name in self._order]
        streamer = Streamer(stops, len(self._blocks), self.buffers, self.world.device, self.link_rate)
        for position, stop in enumerate(stops):
            stop.frozen.bring = partial(streamer.need, position)


def choose_placement(plan: Plan, options: MemoryOptions, world: World, link_rate: float | None = None) -> Placement:
    """The placement that `plan` says, in the form of `--sharding_strategy`.

    link_rate: bytes per second from host memory to this rank's device, if that was measured."""
    if plan.placement == "replicate":
        return Replicated()
    if plan.placement == "stream":
        resident = [block.resident for block in plan.blocks]
        return Streamed(world, resident, plan.head_resident, plan.staging, link_rate)
    reshard, offload = not options.sharding_strategy.endswith("shard_grad_op"), plan.placement == "shard_offload"
    return Sharded(world, reshard, shard_count(options, world), offload)


def _keep_whole(unit: Unit, whole: Tensor) -> None:
    """This rank keeps all of a unit's bytes, on the device or in page-locked host memory as the unit has it."""
    if unit.home == "host" and whole.is_cuda:
        whole = page_lock(torch.empty_like(whole, device="cpu"), "the embedding").copy_(whole)
    unit.frozen.flat = nn.Parameter(whole.view(torch.float32), requires_grad=False)


def held_bytes(unit: Unit) -> int:
    """The bytes of `unit` that this rank really holds now, outside a pass."""
    flat = unit.frozen.flat
    local = flat.to_local() if isinstance(flat, DTensor) else flat
    return 0 if local.is_meta else local.nbytes


def check_bytes(model: CausalModel, placement: Placement) -> None:
    """Assert that each unit takes what the placement promises on this rank."""
    for unit in model.units:
        held, promised = held_bytes(unit), placement.bytes_here(unit)
        assert held == promised, f"{unit.name}: {held} bytes on rank {dist.get_rank()}, {promised} promised"
