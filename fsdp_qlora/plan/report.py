"""A plan in a few lines: what goes where, what it takes, how long a step should be, and what else was considered."""

import math
from collections import Counter
from collections.abc import Mapping

from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Placed
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.placements import PLACEMENT_COSTS
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.search import Found
from fsdp_qlora.units import GIB, count_of

MIB = 2**20  # bytes


def where_line(candidate: Candidate, gpus: bool) -> str:
    where = PLACEMENT_COSTS[candidate.placement].where.format(place="GPU" if gpus else "rank")
    text = f"plan      {candidate.placement}: {where}"
    if not PLACEMENT_COSTS[candidate.placement].streams:
        return text
    resident = sum(b.resident for b in candidate.blocks)
    head = "resident" if candidate.head_resident else "streamed"
    return f"{text}; {resident} of {len(candidate.blocks)} blocks resident, head {head}, {candidate.staging} buffers"


def kept_line(blocks: tuple[BlockPlan, ...], facts: Facts, gpus: bool) -> str:
    if not facts.fused:  # checkpointing and autograd decide
        return f"          every block keeps for backward: {'its input' if facts.remat else 'everything'}"
    counts = _kept(blocks, gpus)
    if len(counts) == 1:
        ((keep, where),) = counts
        return f"          every block keeps for backward: {keep}, in {where}"
    return f"          kept for backward: {kept_text(blocks, gpus)}"


def kept_text(blocks: tuple[BlockPlan, ...], gpus: bool) -> str:
    """Say how many fused blocks keep which level where, the most first."""
    shares = sorted(_kept(blocks, gpus).items(), key=lambda c: -c[1])
    return ", ".join(f"{count_of(n, 'block')} {keep} ({where})" for (keep, where), n in shares)


def _kept(blocks: tuple[BlockPlan, ...], gpus: bool) -> Counter[tuple[str, str]]:
    here = "GPU memory" if gpus else "memory"
    return Counter((b.keep, "host memory" if b.offloaded else here) for b in blocks)


def exchange_line(facts: Facts) -> str:
    by = "by copy engines through host memory" if facts.exchange_by_host else "by NCCL"
    return f"          adapters cross between GPUs {by}"


def memory_lines(
    parts: Mapping[str, int], reserved: int, host: Mapping[str, int], limits: tuple[float, float]
) -> list[str]:
    peak = sum(parts.values())
    if math.isinf(limits[0]):  # no GPU: all of it is the machine's memory
        return [f"memory    {size(peak)} for each rank at the peak{_shares(parts)}"]
    lines = [
        f"memory    {size(peak)} on each GPU at the peak, {size(reserved)} with what the allocator sets aside, "
        f"of {size(limits[0])}{_shares(parts)}"
    ]
    waits = _shares(host)
    if waits:
        lines.append(f"          {size(sum(host.values()))} of host memory per node, of {size(limits[1])}{waits}")
    return lines


def _shares(parts: Mapping[str, int]) -> str:
    """': ' and what takes a hundredth of the whole, or of a GiB; '' where there is nothing."""
    least = min(sum(parts.values()), GIB) / 100
    told = [f"{name} {size(n)}" for name, n in parts.items() if n and n >= least]
    return f": {', '.join(told)}" if told else ""


def time_line(clock: Clock, candidate: Candidate, seconds: float) -> str:
    facts = clock.facts
    arithmetic = clock.arithmetic(candidate) * facts.accumulation
    link = max(clock.link(candidate)) * facts.accumulation
    return (
        f"expected  {seconds:.3f} s a step, {facts.step_tokens / seconds:,.0f} tok/s; "
        f"no less than {max(arithmetic, link):.3f} s: arithmetic {arithmetic:.3f}, link {link:.3f}"
    )


def alternative_lines(facts: Facts, chosen: Placed, found: Mapping[Placed, Found | None]) -> list[str]:
    """Of each placement considered, the best, or that none of it fits."""
    texts = []
    for placement, best in found.items():
        if placement == chosen:
            continue
        if best is None:
            texts.append(f"{placement} does not fit")
            continue
        host = f", host {size(best.host_bytes)}" if best.host_bytes else ""
        texts.append(f"{placement} {best.seconds:.3f} s ({size(best.device_bytes)}{host})")
    return [f"          instead of: {'; '.join(texts)}"] if texts else []


def size(nbytes: float) -> str:
    """Three digits or so: 22.9 GiB, 6.55 GiB, 84.0 MiB, 0.25 MiB."""
    number, unit = (nbytes / GIB, "GiB") if nbytes >= GIB / 10 else (nbytes / MIB, "MiB")
    return f"{number:.1f} {unit}" if number >= 10 else f"{number:.2f} {unit}"


def lines(
    candidate: Candidate,
    parts: Mapping[str, int],
    loading: int,
    seconds: float | None,
    facts: Facts,
    rates: Rates | None,
    limits: tuple[float, float],
    found: Mapping[Placed, Found | None],
) -> list[str]:
    """limits: bytes that may be taken on a GPU (infinitely many where there is none) and of host memory."""
    memory, gpus = Memory(facts), not math.isinf(limits[0])
    table = [where_line(candidate, gpus), kept_line(candidate.blocks, facts, gpus)]
    table += [exchange_line(facts)] if gpus and facts.ranks > 1 else []
    reserved = memory.reserved(candidate.placement, sum(parts.values()))
    table += memory_lines(parts, reserved, memory.host_parts(candidate), limits)
    if gpus and loading > sum(parts.values()):
        table.append(f"          {size(loading)} on each GPU while it loads, which is more")
    if rates is not None and seconds is not None:
        table.append(time_line(Clock(facts, rates), candidate, seconds))
        table += alternative_lines(facts, candidate.placement, found)
    return table
