"""The placements by FSDP2: each unit's bytes divided among ranks, on their GPUs or in their host memory."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.memory.pinned import page_lock
from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement.base import Slot
from fsdp_qlora.placement.resident import keep_whole
from fsdp_qlora.plan.placements import PREFETCH
from fsdp_qlora.plan.plan import Plan


class Sharded:
    """FSDP2: 1/shards of each unit's bytes on each rank, on its GPU or in its host memory, gathered ahead of use.

    reshard: whether a block is freed between its forward and its backward (full_shard) or stays gathered
    (shard_grad_op). shards: ranks that hold one copy between them; with hybrid sharding there are several such groups.
    offload: whether each rank's shards are in host memory. FSDP2 is told to ignore the adapters.
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
        for method in ("logits", "losses"):
            register_fsdp_forward_method(model, method)
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + PREFETCH])
            # Without a list FSDP2 gathers what ran before the first block: the last one, after an evaluation's forward.
            block.set_modules_to_backward_prefetch(blocks[max(0, i - PREFETCH) : i][::-1] or [block])

    def store(self, unit: Unit, whole: Tensor) -> None:
        if unit.home != "shared":
            keep_whole(unit, whole)
            return
        mine = self._shard(unit)
        mine.memory.copy_(whole[mine.start : mine.start + mine.memory.numel()])
        mine.filled()

    def slot(self, unit: Unit) -> Slot | None:
        return self._shard(unit) if unit.home == "shared" else None

    def _shard(self, unit: Unit) -> Slot:
        """Return fresh memory for this rank's shard of a unit, which takes it over when it is filled."""
        with torch.no_grad():
            shard = torch.empty_like(unit.frozen.flat, device="cpu" if self.offload else self.device)
            assert isinstance(shard, DTensor), "`prepare` makes it one"
            local = shard.to_local()
            if self.pin:
                page_lock(local, "use_cpu_offload")
        state = {"flat": nn.Parameter(shard, requires_grad=False)}
        filled = partial(unit.frozen.load_state_dict, state, assign=True)
        return Slot(local.view(torch.uint8), self.index * local.nbytes, filled)

    def finish(self) -> None:
        pass

    def promised_bytes(self, unit: Unit) -> int:
        return unit.frozen.layout.nbytes // (self.shards if unit.home == "shared" else 1)

    def shrink(self, plan: Plan) -> None:
        pass
