"""A training step on the meta device, by the program's own code: the tensors that it asks for, and when they live.

Nothing is computed and nothing allocated; the model is the one that will train, before its weights are loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.world import World
from fsdp_qlora.kernels.device import take_from
from fsdp_qlora.memory.activation_offload import ActivationOffload
from fsdp_qlora.memory.arena import Recorder
from fsdp_qlora.memory.arena_layout import Life
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.scratch import Shared
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.plan.candidate import BlockPlan

META = torch.device("meta")


class _Done:
    """An exchange that is over."""

    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


class _Nowhere:
    """Exchanges nothing. widens: as the exchange that it stands for."""

    def __init__(self, widens: bool) -> None:
        self.widens = widens

    def all_gather(self, whole: Tensor, shard: Tensor) -> _Done:
        return _Done()

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> _Done:
        return _Done()

    def release_waits(self) -> None:
        pass


class _Tables(nn.Module):
    """Stands for a rotary embedding, whose tables may depend on numbers that meta tensors have not."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.width = head_dim // 2

    def forward(self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> list[Tensor]:
        return [torch.empty(position_ids.shape[-1], self.width, device=META) for _ in range(2)]


class Rehearsed(NamedTuple):
    """lives: of a step's tensors. offloaded: for each block that offloads what it keeps in host memory, in the order of
    forward, the bytes per token of each tensor."""

    lives: list[Life]
    offloaded: list[list[int]]


def rehearse(
    model: CausalModel, blocks: Sequence[BlockPlan], config: Config, context: int, world: World, widens: bool
) -> Rehearsed:
    """Run a step for rows of `context` tokens that are all labels.

    model: of fused blocks, still on the meta device. blocks: what each keeps. widens: as the exchange's."""
    accumulates = config.training.gradient_accumulation_steps > 1
    with _recording(model, blocks, config, context, world, accumulates) as (recorder, adapters, inputs, offload):
        adapters.exchange = _Nowhere(widens)
        # Where gradients are summed up over micro-batches first, what is reduced after the last has no place.
        summed = config.memory.no_sync and accumulates
        adapters.begin_micro_batch(last=not summed)
        model(*inputs, 1.0).backward()
        adapters.finish()
        adapters.update(int)  # an optimizer's step takes nothing
        adapters.publish()
        adapters.zero_grad()
        return Rehearsed(recorder.lives(), [] if offload is None else offload.offloaded_sizes)


def rehearse_forward(model: CausalModel, config: Config, context: int, world: World) -> list[Life]:
    """Run an evaluation's forward, for rows as `rehearse` has them; return the lives of its tensors."""
    blocks = [BlockPlan(True, Keep.INPUT.label, False)] * len(model.blocks)  # whatever they keep otherwise
    with _recording(model, blocks, config, context, world, False) as (recorder, _, inputs, _), model.evaluating():
        model(*inputs, 1.0)
        return recorder.lives()


class _Recording(NamedTuple):
    recorder: Recorder
    adapters: ShardedAdapters
    inputs: tuple[Tensor, Tensor, Tensor]  # of the model: rows of `context` tokens that are all labels
    offload: ActivationOffload | None


@contextmanager
def _recording(
    model: CausalModel, blocks: Sequence[BlockPlan], config: Config, context: int, world: World, accumulates: bool
) -> Iterator[_Recording]:
    """Note the lives of what is asked for within it, by the model on the meta device."""
    batch = config.training.batch_size
    ids = torch.zeros(batch, context, dtype=torch.int64, device=META)
    places, labels = (torch.zeros(batch * context, dtype=torch.int64, device=META) for _ in range(2))
    recorder, there = Recorder(), replace(world, device=META)
    with _on_meta(model, blocks, batch * context) as offload:
        adapters = ShardedAdapters(model, there, config, accumulates=accumulates, draw=False)
        take_from(recorder)
        try:
            yield _Recording(recorder, adapters, (ids, places, labels), offload)
        finally:
            take_from(None)


@contextmanager
def _on_meta(model: CausalModel, blocks: Sequence[BlockPlan], tokens: int) -> Iterator[ActivationOffload | None]:
    """All of the model on the meta device, its blocks keeping what the plan says; afterwards as it was."""
    rotary = model.backbone.rotary_emb
    model.backbone.rotary_emb = _Tables(model.fused_blocks[0].spec.attention.head_dim)
    buffers = {(m, name): b for m in model.backbone.modules() for name, b in m.named_buffers(recurse=False)}
    before = {block: block.before_forward for block in model.blocks.values()}
    adapters = {linear: linear.adapter_parameters() for linear in model.linears().values()}
    shared = Shared.on(META, model.precision.compute)
    offload = ActivationOffload(META, tokens) if any(plan.offloaded for plan in blocks) else None
    passes = [
        replace(fused.keeping(Keep.named(plan.keep), offload, plan.offloaded), shared=shared)
        for fused, plan in zip(model.fused_blocks, blocks, strict=True)
    ]
    state = torch.get_rng_state()
    with ExitStack() as stack:
        stack.enter_context(model.computing_by(passes))
        for unit in {unit.frozen for unit in model.units}:
            stack.enter_context(unit.on_meta())
        try:
            for (module, name), buffer in buffers.items():
                setattr(module, name, buffer.to(META))
            for block in before:
                block.before_forward = []
            yield offload
        finally:
            model.backbone.rotary_emb = rotary
            for (module, name), buffer in buffers.items():
                setattr(module, name, buffer)
            for block, calls in before.items():
                block.before_forward = calls
            for linear, parameters in adapters.items():
                for name, parameter in parameters.items():
                    setattr(linear, name, parameter)
                linear.values_change()
            torch.set_rng_state(state)
