"""What a run is about to do and what it needs, in a few lines before anything is loaded; refuses what cannot fit."""

import psutil
import torch
from transformers import PretrainedConfig

from fsdp_qlora.config import Config
from fsdp_qlora.data import Batches
from fsdp_qlora.errors import UserError
from fsdp_qlora.fusing import Fusion
from fsdp_qlora.model import CausalModel
from fsdp_qlora.optim import state_bytes
from fsdp_qlora.placement import PREFETCH, Placement
from fsdp_qlora.skeleton import Attention
from fsdp_qlora.units import GIB
from fsdp_qlora.world import World


def adapter_count(model: CausalModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_bytes(model: CausalModel, config: Config, world: World) -> int:
    """Of a rank: the working copy, and its share of float32 masters, gradients and optimizer state."""
    count = adapter_count(model)
    state = state_bytes(config.training.optimizer, world.device.type)
    whole = model.precision.compute.itemsize + (4 if config.memory.no_sync else 0)
    return count * whole + int(count * (4 + 4 + state)) // world.size


def describe(
    model: CausalModel,
    hf_config: PretrainedConfig,
    config: Config,
    placement: Placement,
    batches: Batches,
    total_steps: int,
    attention: Attention,
    fusion: Fusion,
    world: World,
) -> list[str]:
    """The lines of the start-up table."""
    linears = model.linears()
    weights = sum(torch.Size(e.shape).numel() for u in model.units for e in u.frozen.layout.entries.values())
    codec = next(iter(linears.values())).weight
    stored = codec.home.layout.entries[codec.name].codec.name
    base = sum(u.frozen.layout.nbytes for u in model.units)
    adapted = sum(m.lora_A is not None for m in linears.values())
    training = config.training
    on_device, host = needs(model, config, placement, world)
    on_cpu = world.device.type == "cpu"
    ranks = f"{world.size} rank{'s' * (world.size > 1)}"
    lines = [
        f"model     {config.model.model_name}: {hf_config.model_type}, {len(model.blocks)} layers, "
        f"{_si(weights)} parameters" + (", RANDOM WEIGHTS" if config.model.dummy_weights else ""),
        f"base      {_size(base)} frozen, linears {stored}; {placement.name}",
        f"adapters  LoRA rank {config.adapter.lora_rank} on {adapted} of {len(linears)} linears: "
        f"{_si(adapter_count(model))} parameters; {training.optimizer}, "
        f"master copy and state sharded over {ranks}",
        f"compute   {config.model.precision}, {fusion}",
        f"          {_recomputation(config, fusion, attention)}",
        f"data      {batches.rows.summary}",
        f"run       {total_steps} steps of {batches.rows_per_step} rows "
        f"({training.batch_size} x {training.gradient_accumulation_steps} x {ranks}), "
        f"context {config.data.context_length}",
        f"needs     {_needs(on_device, host, on_cpu)}",
    ]
    return lines


def needs(model: CausalModel, config: Config, placement: Placement, world: World) -> tuple[float, float]:
    """(bytes on each rank's device, bytes of frozen base in pinned host memory per node), before activations."""
    offload = config.memory.use_cpu_offload
    on_host = [u for u in model.units if u.home == "host" or (offload and u.home == "shared")]
    host = sum(placement.bytes_here(u) for u in on_host)
    device = sum(placement.bytes_here(u) for u in model.units) - host
    if placement.shards > 1 or offload:
        block = max(u.frozen.layout.nbytes for u in model.units if u.name in model.blocks)
        other = max((u.frozen.layout.nbytes for u in model.units if u.home == "shared"), default=0)
        device += max((PREFETCH + 2) * block, 2 * other)  # blocks in flight; the head alone, as it arrives and whole
    return device + adapter_bytes(model, config, world), host * world.local_size


def check_fits(model: CausalModel, config: Config, placement: Placement, world: World) -> None:
    """Raises UserError where what must lie on a GPU, before any activation, is more than is free there."""
    if world.device.type != "cuda":
        return
    needed, _ = needs(model, config, placement, world)
    free: float = torch.cuda.mem_get_info()[0]
    if config.memory.gpu_memory_gib is not None:
        free = min(free, config.memory.gpu_memory_gib * GIB)
    if needed > free:
        offload = config.memory.use_cpu_offload
        raise UserError(
            f"the run needs {needed / GIB:.1f} GiB on each GPU before activations and may use {free / GIB:.1f}; "
            + ("lower lora_rank" if offload else "use --use_cpu_offload true, more GPUs, or a lower lora_rank")
        )


def _recomputation(config: Config, fusion: Fusion, attention: Attention) -> str:
    memory = config.memory
    if fusion.blocks:
        text = (
            "nothing is recomputed" if fusion.keep == "all" else "the rest is recomputed in backward, inside the block"
        )
        idle = memory.use_gradient_checkpointing and memory.reentrant_checkpointing
        return text + ("; reentrant_checkpointing has no effect on fused blocks" if idle else "")
    kind = "no" if not memory.use_gradient_checkpointing else "non-reentrant"
    if memory.use_gradient_checkpointing and memory.reentrant_checkpointing:
        kind = "reentrant"
    return f"{kind} gradient checkpointing, {attention.name} attention ({attention.reason})"


def _needs(on_device: float, host: float, on_cpu: bool) -> str:
    if on_cpu:
        return f"{_size(on_device + host)} of memory per rank before activations"
    text = f"{_size(on_device)} on each GPU before activations"
    if host:
        text += f"; {_size(host)} of pinned host memory per node ({_size(psutil.virtual_memory().available)} available)"
    return text


def _size(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"


def _si(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
