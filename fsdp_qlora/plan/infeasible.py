"""Where nothing fits: what is needed, what there is, and the nearest thing that would fit, all of it computed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.kernels.attention_on_meta import keys_seen
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.search import Budget, Search, Wishes, placements
from fsdp_qlora.units import GIB, as_gib

CONTEXT_STEP, RANK_STEP = 64, 8  # tokens and ranks between the values that are tried
LEFT = (
    "leaving sharding_strategy, use_cpu_offload, resident_blocks, keep_activations and use_activation_cpu_offload to "
    "the plan"
)
TENTH = GIB / 10  # bytes: what a user is told is rounded up to tenths of a GiB


@dataclass(frozen=True)
class Nearest:
    """What would fit with everything else as it is; None where no value does.

    context: tokens, in steps of `CONTEXT_STEP`. batch: rows. rank: of the adapters, in steps of `RANK_STEP`. device:
    bytes that a GPU must be able to give; host: bytes of host memory."""

    context: int | None
    batch: int | None
    rank: int | None
    device: int | None
    host: int | None


def nearest(facts: Facts, wishes: Wishes, budget: Budget) -> Nearest:
    """Return what would fit. Facts of another batch or rank are never less than what the program would have."""
    here = _searches(facts, wishes, budget)
    devices = [n for n in (search.least_device() for search in here) if n is not None]
    hosts = [n for n in (search.least_host() for search in here) if n is not None]

    def fits(changed: Facts) -> bool:
        return any(search.fits() for search in _searches(changed, wishes, budget))

    return Nearest(
        _last(range(CONTEXT_STEP, facts.context, CONTEXT_STEP), lambda n: fits(with_context(facts, n))),
        _last(range(1, facts.batch), lambda n: fits(with_batch(facts, n))),
        _last(range(RANK_STEP, facts.lora_rank, RANK_STEP), lambda n: fits(with_rank(facts, n))),
        min(devices, default=None),
        min(hosts, default=None),
    )


def refusal(facts: Facts, wishes: Wishes, budget: Budget, margin: int = 0) -> str:
    """One line for the user. margin: bytes of a GPU that what has to be laid out in it takes beyond its sum."""
    close = nearest(facts, wishes, replace(budget, device_bytes=budget.device_bytes - margin))
    have, host = as_gib(budget.device_bytes + budget.outside_bytes), as_gib(budget.host_bytes)
    if budget.outside_bytes:
        have += f" of each GPU, {as_gib(budget.outside_bytes, 2)} of them for CUDA and all else that does not train,"
    else:
        have += " of each GPU"
    needs = []
    if close.device is not None:
        needs.append(f"at least {_up(close.device + margin + budget.outside_bytes)} on each GPU")
    if close.host is not None:
        needs.append(f"at least {_up(close.host)} of host memory per node")
    if not needs:
        needs.append("more of both")
    lower = {"--context_length": close.context, "--batch_size": close.batch, "--lora_rank": close.rank}
    ways = [left_to_the_plan(facts)] if fixed(facts, wishes) and fits_free(facts, budget) else []
    ways += [f"{option} {value}" for option, value in lower.items() if value is not None]
    nothing = "no shorter context, smaller batch or lower rank alone does either"
    return (
        f"the run does not fit into the {have} and {host} of host memory that it may use: it needs "
        f"{' or '.join(needs)}; what would fit: {', or '.join(ways) or nothing}"
    )


def fixed(facts: Facts, wishes: Wishes) -> bool:
    """Whether the user fixed anything."""
    return replace(wishes, placements=wishes.placements or _free(facts)) != Wishes(_free(facts))


def fits_free(facts: Facts, budget: Budget) -> bool:
    """Whether something fits with nothing fixed: `auto` shards over all ranks and frees what it gathered."""
    free = replace(facts, remat=True, shards=facts.ranks, reshard=True)
    return any(search.fits() for search in _searches(free, Wishes(_free(facts)), budget))


def left_to_the_plan(facts: Facts) -> str:
    return LEFT if facts.remat else f"use_gradient_checkpointing true and {LEFT}"


def _free(facts: Facts) -> tuple[str, ...]:
    """Placements of which the plan chooses where none is asked for."""
    return ("replicate", "shard", "stream") if facts.ranks > 1 else ("replicate", "stream")


def with_context(facts: Facts, context: int) -> Facts:
    share = facts.keys_per_query / keys_seen(facts.context, None)
    return replace(facts, context=context, keys_per_query=share * keys_seen(context, None))


def with_batch(facts: Facts, batch: int) -> Facts:
    """With fewer rows. They may be the longest: all tokens of a batch can be theirs, and widths are padded."""
    share = -(-facts.tokens // (batch * CONTEXT_STEP)) * CONTEXT_STEP
    return replace(facts, batch=batch, context=min(facts.longest_row or facts.context, share))


def with_rank(facts: Facts, rank: int) -> Facts:
    """With adapters of another rank on the same linears. Magnitudes stay as many as they are."""
    ranks = ("lora_rank", "lora_rank_qkv", "lora_rank_o", "lora_rank_gate_up", "lora_rank_down")
    scaled = {name: getattr(facts, name) * rank // facts.lora_rank for name in ranks}
    fixed = _magnitudes(facts)
    for name in ("adapter_parameters", "largest_adapters"):
        scaled[name] = fixed - (fixed - getattr(facts, name)) * rank // facts.lora_rank
    return replace(facts, **scaled)


def _magnitudes(facts: Facts) -> int:
    """Return how many magnitudes a block has at most."""
    if not ADAPTERS[facts.adapter].reads_norms:
        return 0
    qkv = (facts.queries, facts.pairs, facts.pairs) if facts.qkv_linears == 3 else (facts.qkv,)
    gate_up = (facts.intermediate,) * 2 if facts.gate_up_linears == 2 else (2 * facts.intermediate,)
    outputs = (*qkv, facts.hidden, *gate_up, facts.hidden)
    adapted = facts.adapted or "1" * len(outputs)
    return sum(width for width, has_adapter in zip(outputs, adapted, strict=True) if has_adapter == "1")


def _searches(facts: Facts, wishes: Wishes, budget: Budget) -> list[Search]:
    memory = Memory(facts)
    return [Search(memory, None, placement, wishes, budget) for placement in placements(facts, wishes)]


def _up(nbytes: int) -> str:
    return as_gib(math.ceil(nbytes / TENTH) * TENTH)


def _last(values: range, works: Callable[[int], bool]) -> int | None:
    """The last of ascending values that works, where smaller ones do if a larger one does."""
    low, high = -1, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(values[middle]) else (low, middle)
    return values[low] if low >= 0 else None
