"""Where the base is while a model answers, and how many rows it answers at a time: what fits, for the most tokens.

There is no backward, so a plan of training would leave memory unused. A pass of a base that is streamed costs the same
for one row as for hundreds, so there the rows come first and blocks stay on the device in what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.shards import shard_count
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.exchange.choose import through_host
from fsdp_qlora.generation.cache import KVCache
from fsdp_qlora.generation.decoder import PROMPT_TOKENS, fused_specs
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.skeleton import text_config
from fsdp_qlora.plan.budget import find_budget
from fsdp_qlora.plan.plan import BlockPlan, Budget, Placed, Plan
from fsdp_qlora.plan.planning import wishes_of
from fsdp_qlora.units import GIB

MOST_ROWS = {"replicate": 64, "shard": 256, "shard_offload": 256, "stream": 256}  # where nobody says how many
STAGING = 3  # buffers for streamed blocks: one that is computed, one that has come, one that comes
GATHERED = 3  # blocks that are whole at a time where they are sharded
SPARE = 0.03  # of the budget: what libraries take, and the allocator's rounding


@dataclass(frozen=True)
class Fit:
    """plan: of the placement. rows: of a rank at a time. line: both, for the user."""

    plan: Plan
    rows: int
    line: str


@dataclass(frozen=True)
class _Needs:
    """Bytes of a rank's device."""

    blocks: list[int]
    other: int  # embedding, head and the rest, where they are on the device
    head: int  # of other, what may be streamed
    host: int  # an embedding's rows
    row: int
    work: int


def fit(
    model: CausalModel, config: Config, world: World, capacity: int, asked: int, rows_per_rank: int, longest: int
) -> Fit:
    """Return what fits. A collective.

    capacity: tokens of a row with its answer. asked: rows at a time, -1: as many as pay. rows_per_rank: that there
    are. longest: tokens of a prompt. Raises UserError on every rank alike where not even one row fits."""
    budget, needs = find_budget(config.memory, world), _needs(model, capacity, longest)
    tried = []
    for placement in _order(config, world, needs):
        most = min(rows_per_rank, MOST_ROWS[placement]) if asked == -1 else min(asked, rows_per_rank)
        found = _try(placement, needs, budget, most, asked, config, world)
        if isinstance(found, Fit):
            return found
        tried.append(f"{placement} needs {found / GIB:.1f} GiB with one row")
    limit = f"{budget.device_bytes / GIB:.1f} GiB"
    remedy = "lower max_new_tokens or batch_size, use more or larger cards, or --use_cpu_offload true"
    raise UserError(
        f"gpu_memory_gib: nothing fits into the {limit} of a card: {'; '.join(tried)}; {remedy}"
    ).on_every_rank(world.rank)


def answering_bytes(model: CausalModel, capacity: int, longest: int) -> int:
    """Return what answering one row at a time takes of a device beside the model. Arguments as of `fit`."""
    needs = _needs(model, capacity, longest, longest)
    return needs.row + needs.work


def _needs(model: CausalModel, capacity: int, longest: int, at_least: int = PROMPT_TOKENS) -> _Needs:
    """at_least: tokens of a pass over prompts."""
    linears, config = model.linears().values(), text_config(model.backbone.config)
    size = model.precision.compute.itemsize
    hidden = config.hidden_size
    widest = max(max(linear.out_features, linear.in_features) for linear in linears)
    specs = fused_specs(model)
    if specs is not None:
        row = KVCache.row_bytes(specs, capacity, model.precision.compute)
    else:  # the keys before and behind a step's are there at once
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        row = 3 * config.num_hidden_layers * heads * head_dim * capacity * size
    # Decoded: the widest pair of linears that share an input. Of a prompt's tokens: the stream and an MLP's middle.
    decoded = 2 * max(linear.out_features * linear.in_features for linear in linears) * size
    tokens = max(at_least, longest)
    adapters = sum(p.numel() for linear in linears for p in linear.adapter_parameters().values()) * size * 3 // 2
    on_device = [unit for unit in model.units if unit.home != "host"]
    blocks = [unit.frozen.layout.nbytes for unit in on_device if unit.name in model.blocks]
    other = sum(unit.frozen.layout.nbytes for unit in on_device if unit.name not in model.blocks)
    head = 0 if model.is_tied() else model.head.frozen.layout.nbytes
    host = sum(unit.frozen.layout.nbytes for unit in model.units if unit.home == "host")
    logits = 16 * int(config.vocab_size)  # of a row: float32, and as much again three times where tokens are drawn
    return _Needs(
        blocks, other, head, host, row + logits, decoded + adapters + tokens * (6 * hidden + 4 * widest) * size
    )


def _order(config: Config, world: World, needs: _Needs) -> Sequence[Placed]:
    """Return the placements to try, the one to be taken first; the options may leave one."""
    allowed = wishes_of(config.memory, world.size).placements or ("replicate", "shard", "stream")
    if len(allowed) == 1:
        return allowed  # type: ignore[return-value]
    by_host = through_host(config.memory, world)
    order = ("replicate", "stream", "shard") if by_host else ("replicate", "shard", "stream")
    return [placement for placement in order if placement in allowed]  # type: ignore[misc]


def _try(
    placement: Placed, needs: _Needs, budget: Budget, most: int, asked: int, config: Config, world: World
) -> Fit | int:
    """Return the plan, or the bytes that it needs with a single row."""
    free, base = budget.device_bytes, sum(needs.blocks) + needs.other
    spare, largest = needs.work, max(needs.blocks)
    resident = len(needs.blocks)
    host, head_resident, staging = needs.host, True, 0
    if placement in ("shard", "shard_offload"):
        base = GATHERED * largest + (0 if placement == "shard_offload" else base // shard_count(config.memory, world))
    if placement == "stream":
        staging, base = STAGING, needs.other + STAGING * largest
        host += sum(needs.blocks)
    fixed = base + spare
    if free == float("inf"):
        rows = most
    else:
        left = free * (1 - SPARE) - fixed
        rows = min(most, int(left // needs.row))
        if rows < 1 or (asked != -1 and rows < most):
            return fixed + needs.row * (1 if asked == -1 else most)
    if placement == "stream":
        wanted = config.memory.resident_blocks
        room = len(needs.blocks) if free == float("inf") else int((left - rows * needs.row) // largest)
        resident = min(room, len(needs.blocks)) if wanted is None else wanted
        if resident > min(room, len(needs.blocks)):
            return fixed + needs.row + resident * largest
        if free == float("inf") and wanted is None:
            resident = 0
    if host > budget.host_bytes:
        return 1 << 62
    spots = _spread(len(needs.blocks), resident)
    plan = Plan(
        placement, tuple(BlockPlan(stays, "input", False) for stays in spots), head_resident, staging, rows, 1,
        fixed + rows * needs.row, host, None, {},
    )  # fmt: skip
    where = f"{placement}, {resident} of {len(spots)} blocks on the device" if placement == "stream" else placement
    return Fit(plan, rows, f"answers   {rows} row{'s' * (rows > 1)} at a time on each rank, base: {where}")


def _spread(blocks: int, resident: int) -> list[bool]:
    """Return for each block whether it stays, those that do spread evenly."""
    return [(i + 1) * resident // blocks > i * resident // blocks for i in range(blocks)]
