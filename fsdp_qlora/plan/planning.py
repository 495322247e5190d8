"""From a model, the options and this machine to the plan: what the user fixed, what there is, what it will be.

The plan itself (`plan/`) is arithmetic; here are its inputs read and its words told.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.options import Config, MemoryOptions
from fsdp_qlora.data.packing import Bins
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.distributed.shards import shard_count
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.exchange.choose import through_host
from fsdp_qlora.memory.activation_offload import ActivationOffload
from fsdp_qlora.memory.arena import Arena
from fsdp_qlora.memory.arena_layout import Schedule
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.fuse import Fusion
from fsdp_qlora.optim.optimizers import state_bytes
from fsdp_qlora.plan.budget import HOST_SHARE, agreed_budget, device_bytes, find_budget
from fsdp_qlora.plan.calibrate.rates import calibrate
from fsdp_qlora.plan.inputs import ATTENTION, Facts, facts_of
from fsdp_qlora.plan.layouts import Layouts
from fsdp_qlora.plan.plan import BlockPlan, Budget, Plan, Wishes, make_plan, plan_record, refit_plan, table
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.remembered import remembering
from fsdp_qlora.runtime.host_memory import available_host_bytes
from fsdp_qlora.units import as_gib


@dataclass(frozen=True)
class Planned:
    """A plan, its table for the user, its record for `write_plan`, and what it was made from: options as given, facts,
    rates, budget. layout: where the tensors of a step lie, None where blocks are not fused."""

    plan: Plan
    lines: list[str]
    record: dict[str, Any]
    config: Config
    facts: Facts
    rates: Rates | None
    budget: Budget
    layout: Layouts | None
    beside: int = 0  # bytes of a device that are not in the budget, as something else takes them between two steps

    @property
    def schedule(self) -> Schedule | None:
        return None if self.layout is None else self.layout.of(self.plan.blocks)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks; None where no times are known."""
        return None if self.plan.seconds is None else self.facts.step_tokens / self.plan.seconds

    @property
    def link_rate(self) -> float | None:
        """Bytes per second from host memory to each rank's device, all at once; None where it was not measured."""
        return None if self.rates is None else self.rates.h2d


def plan_run(
    model: CausalModel, config: Config, fusion: Fusion, lengths: RowLengths | None, world: World, beside: int = 0
) -> Planned:
    """The plan for rows of these lengths; None: all fill the context. A collective. Raises UserError where nothing
    fits. beside: bytes of a device that are not the plan's: answers between two steps take them."""
    world.together(lambda: shard_count(config.memory, world))  # what cannot be divided need not be planned
    optimizer = state_bytes(config.training.optimizer, world.device.type)

    def known(sized: Config) -> tuple[Facts, Rates | None]:
        here = facts_of(model, sized, world, fusion, optimizer, lengths=lengths)
        here = replace(here, exchange_by_host=through_host(config.memory, world), multiprocessors=splits(config, world))
        facts = sending(agreed(here, world))
        return facts, calibrate(facts, model, world)

    def layouts(sized: Config, facts: Facts) -> Layouts:
        return Layouts(model, sized, facts.context, facts.exchange_by_host, world)

    budget = find_budget(config.memory, world)
    try:
        with remembering(world.device.type == "cuda"):
            return leaving(beside, budget, lambda left: fastest_of(config, left, world, known, layouts))
    except UserError as error:
        raise error.on_every_rank(world.rank) from None


def leaving(beside: int, budget: Budget, plan: Callable[[Budget], Planned]) -> Planned:
    """Return the plan of a budget that leaves so many bytes of a device to answers between two steps, and tells so."""
    if not beside or math.isinf(budget.device_bytes):
        return plan(budget)
    kept = f"eval_generate keeps {as_gib(beside, 2)} of each GPU for answers"
    left = replace(budget, device_bytes=budget.device_bytes - beside, outside_bytes=budget.outside_bytes + beside)
    try:
        planned = plan(left)
    except UserError as error:
        raise UserError(f"{error}; {kept}") from error
    return replace(planned, lines=[*planned.lines, kept], beside=beside)


def fastest_of(
    config: Config,
    budget: Budget,
    world: World,
    known: Callable[[Config], tuple[Facts, Rates | None]],
    layouts: Callable[[Config, Facts], Layouts] | None = None,
) -> Planned:
    """The plan of the fastest micro-batch that fits. known: facts and rates of the options with one of them. layouts:
    where the tensors of a step with these lie; without, they are taken to need no more than is alive at once.

    Raises UserError where none fits."""
    refused = None
    found: list[tuple[Plan, Facts, Rates | None, Config]] = []
    for sized in micro_batches(config):
        facts, rates = known(sized)
        try:
            plan = make_plan(facts, rates, wishes_of(config.memory, world.size), budget)
        except UserError as error:  # the same on every rank: they have the same numbers
            refused = error
            continue
        found.append((plan, facts, rates, sized))
    if not found:
        assert refused is not None
        raise refused.on_every_rank(world.rank)
    # Without times the smallest, which fits wherever anything does; the largest of those as fast.
    plan, facts, rates, sized = min(found, key=lambda one: one[0].seconds or one[0].micro_batch)
    layout = layouts(sized, facts) if layouts is not None and facts.fused else None
    if layout is not None:
        try:
            plan = make_plan(facts, rates, wishes_of(config.memory, world.size), budget, layout.nbytes)
        except UserError as error:
            raise error.on_every_rank(world.rank) from None
    lines, record = table(plan, facts, rates, budget), plan_record(plan, facts, rates)
    return Planned(plan, lines, record, config, facts, rates, budget, layout)


def refit_run(planned: Planned, world: World) -> Planned | None:
    """Return the plan for what is free now, which takes less of the GPUs than the one before; None where the options or
    that plan leave nothing to give. A collective."""
    memory, layout = planned.config.memory, planned.layout
    device = device_bytes(memory, world) - planned.beside
    host = planned.plan.host_bytes + HOST_SHARE * available_host_bytes()
    budget = agreed_budget(device, min(host, planned.budget.host_bytes), world)
    wishes, nbytes = wishes_of(memory, world.size), None if layout is None else layout.nbytes
    plan = refit_plan(planned.plan, planned.facts, planned.rates, wishes, budget, nbytes)
    if plan is None:
        return None
    record = plan_record(plan, planned.facts, planned.rates)
    return replace(planned, plan=plan, lines=[], record=record)


def packed_speed(planned: Planned, lengths: RowLengths, world: World) -> float | None:
    """Return the tokens per second that the plan would expect of the same rows in bins of the context's length.

    By the rates of the rows as they are, which longer rows may exceed. None where no times are known, or nothing would
    fit."""
    facts, config = planned.facts, planned.config
    if planned.rates is None:
        return None
    bins = Bins(config.data.context_length, lengths.lengths)
    filled = round(facts.batch * bins.fill * bins.capacity)
    flat = facts.fused and replace(lengths, bins=bins).flat(facts.batch)
    packed = replace(facts, context=bins.capacity, mean_tokens=filled, flat=flat)
    try:
        with remembering(world.device.type == "cuda"):
            plan = make_plan(packed, planned.rates, wishes_of(config.memory, world.size), planned.budget)
    except UserError:
        return None
    return None if plan.seconds is None else packed.step_tokens / plan.seconds


def agreed(facts: Facts, world: World) -> Facts:
    """What may differ from rank to rank (cards, nodes), as the one that needs most has it: all must find one plan."""
    here = [facts.workspace_bytes, facts.local_ranks, ATTENTION.index(facts.attention), not facts.exchange_by_host]
    here.append(facts.multiprocessors)
    workspace, ranks, attention, by_nccl, most = (int(max(column)) for column in zip(*world.gather(here), strict=True))
    return replace(
        facts,
        workspace_bytes=workspace,
        local_ranks=ranks,
        attention=ATTENTION[attention],
        exchange_by_host=not by_nccl,
        multiprocessors=most,
    )


def splits(config: Config, world: World) -> int:
    """Return `Facts.multiprocessors` of this rank's card."""
    if not config.training.deterministic or world.device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(world.device).multi_processor_count)


def sending(facts: Facts) -> Facts:
    """Through host memory gradients cross in the dtype that they have, unless they were summed before."""
    summed = facts.no_sync and facts.accumulation > 1
    narrow = facts.exchange_by_host and not summed
    return replace(facts, sent_bytes=min(facts.compute_bytes, facts.reduce_bytes) if narrow else facts.reduce_bytes)


def micro_batches(config: Config) -> list[Config]:
    """The options as they are, or with every micro-batch that divides a step's rows evenly, the largest first."""
    training = config.training
    if training.batch_size > 0:
        return [config]
    rows = training.gradient_accumulation_steps
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    return [with_micro_batch(config, size, rows // size) for size in sizes]


def with_micro_batch(config: Config, rows: int, accumulation: int) -> Config:
    """Return the options as who knows the plan's choice would give them."""
    training = replace(config.training, batch_size=rows, gradient_accumulation_steps=accumulation)
    return replace(config, training=training)


def wishes_of(memory: MemoryOptions, ranks: int) -> Wishes:
    """What the options leave to the plan, and what not."""
    keep = None if memory.keep_activations == "auto" else memory.keep_activations
    return Wishes(
        placements=_placements(memory, ranks),
        resident_blocks=memory.resident_blocks,
        keep=keep if memory.use_gradient_checkpointing else "all",
        offload=memory.use_activation_cpu_offload,
    )


def _placements(memory: MemoryOptions, ranks: int) -> tuple[str, ...]:
    """Those that are allowed."""
    if memory.use_cpu_offload:
        return ("stream",) if memory.cpu_offload_by == "stream" else ("shard_offload",)
    if memory.sharding_strategy == "ddp" or (memory.sharding_strategy != "auto" and ranks == 1):
        return ("replicate",)
    if memory.sharding_strategy != "auto":
        return ("shard",)
    resident = ("replicate", "shard") if ranks > 1 else ("replicate",)
    return resident if memory.use_cpu_offload is False else (*resident, "stream")


def keep_activations(
    model: CausalModel,
    blocks: Sequence[BlockPlan],
    most_tokens: int,
    device: torch.device,
    link_rate: float | None = None,
    offloaded: Sequence[Sequence[int]] = (),
) -> None:
    """Let fused blocks keep what their plans say; generic ones are left as they are.

    most_tokens: of a micro-batch, padding included. link_rate: bytes per second between host memory and the device, if
    that was measured. offloaded: see `Layouts`; host memory for it is made from now on, beside what follows."""
    if not model.fused_blocks:
        return
    offloads = any(plan.offloaded for plan in blocks)
    offload = ActivationOffload(device, most_tokens, link_rate=link_rate) if offloads else None
    if offload is not None and offloaded:
        offload.reserve(offloaded)
    model.keep([(Keep.named(plan.keep), plan.offloaded) for plan in blocks], offload)


def make_arena(schedule: Schedule | None, world: World) -> Arena | None:
    """The memory of a step's tensors, when all that loading took has been given back. Peaks are counted from here."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    return None if schedule is None else Arena(schedule, world.device)


def write_plan(folder: Path, record: dict[str, Any]) -> None:
    """Beside the run's results, for who compares it with what came."""
    (folder / "plan.json").write_text(json.dumps(record, indent=1) + "\n")
