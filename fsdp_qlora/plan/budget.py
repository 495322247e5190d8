"""The memory that a plan may use of this machine: of a rank's GPU, and of a node's host memory."""

import math
from dataclasses import replace

import torch

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import OR_ELSEWHERE, UserError
from fsdp_qlora.plan.search import Budget
from fsdp_qlora.runtime.gpu_memory import outside_bytes
from fsdp_qlora.runtime.host_memory import available_host_bytes, total_host_bytes
from fsdp_qlora.runtime.launcher import allocator_grows
from fsdp_qlora.units import GIB, as_gib

# Bytes of a GPU that go to others than PyTorch's allocator after the plan is made: kernels that are loaded when they
# are first used, tables of the host memory that the GPU reads.
LATER, BY_NCCL = 208 << 20, 224 << 20  # (0.16 GiB on one rank, 0.35 to 0.40 on two: H100, H200)
# Of a GPU that is lost in pieces where the allocator has segments of fixed size (docs/LOG.md: 2.2 of 24 GiB),
# beyond the share that every plan leaves.
PIECES = 0.06
# Of what is free as much as makes whole steps, so that a start with a little more or less of it finds the plan of the
# one before (`remembered.py`): a tenth of a percent of a card, and of host memory half a block of 70B.
DEVICE_STEP, HOST_STEP = 16 << 20, 256 << 20
HOST_SHARE = 0.9  # of the host memory that is available: the rest is for Python, its libraries and the page cache


def find_budget(memory: MemoryOptions, world: World) -> Budget:
    """What the plan may use of this machine: the least of any rank's. A collective.

    Raises UserError on every rank for a limit that limits nothing."""
    if memory.host_memory_gib is not None and world.device.type != "cuda":
        raise UserError(
            f"host_memory_gib: {memory.host_memory_gib:g} has no effect without a GPU; omit it, {OR_ELSEWHERE}"
        ).on_every_rank(world.rank)
    world.together(lambda: check_host_limit(memory.host_memory_gib))
    given = memory.host_memory_gib
    host = whole_steps(HOST_SHARE * available_host_bytes(), HOST_STEP) if given is None else given * GIB
    found = agreed_budget(whole_steps(device_bytes(memory, world), DEVICE_STEP), host, world)
    return replace(found, outside_bytes=max(int(most) for (most,) in world.gather([outside(world)])))


def check_host_limit(gib: float | None) -> None:
    """Raise UserError where `host_memory_gib` is more than this machine, container or job can have."""
    total = total_host_bytes()
    if gib is not None and gib * GIB > total:
        raise UserError(
            f"host_memory_gib: {gib:g} is more than the {as_gib(total)} that this machine, its container or its job "
            "may have; omit it or lower it"
        )


def whole_steps(nbytes: float, step: int) -> float:
    """Return the largest multiple of `step` that is not more; no limit stays none."""
    return nbytes if math.isinf(nbytes) else nbytes // step * step


def agreed_budget(device: float, host: float, world: World) -> Budget:
    """Return the least of what each rank's GPU and node have, in whole bytes; no limit stays none. A collective."""
    least = [min(column) for column in zip(*world.gather([device, host]), strict=True)]
    return Budget(*(nbytes if math.isinf(nbytes) else int(nbytes) for nbytes in least))


def outside(world: World) -> int:
    """Return the bytes that a `--gpu_memory_gib` has to have for others than the plan, on this rank's GPU."""
    if world.device.type != "cuda":
        return 0
    return outside_bytes(world.device) + LATER + (BY_NCCL if world.size > 1 else 0) + DEVICE_STEP


def device_bytes(memory: MemoryOptions, world: World) -> float:
    """Return the bytes that PyTorch may have of this rank's GPU as things are now, those that it has included; no limit
    without a GPU."""
    device = world.device
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    nbytes: float = free + torch.cuda.memory_reserved(device)
    if memory.gpu_memory_gib is not None:
        nbytes = min(nbytes, memory.gpu_memory_gib * GIB - outside_bytes(device))
    nbytes -= LATER + (BY_NCCL if world.size > 1 else 0)
    return nbytes * (1 if allocator_grows() else 1 - PIECES)
