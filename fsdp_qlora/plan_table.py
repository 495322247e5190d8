"""A plan in a few lines: what goes where, what it takes, how long a step should be, and what else was considered."""

import math
from collections import Counter
from collections.abc import Mapping

from fsdp_qlora.plan_facts import Facts
from fsdp_qlora.plan_memory import RESERVED, BlockPlan, Candidate, Memory, Placed
from fsdp_qlora.plan_search import Found
from fsdp_qlora.plan_time import Clock, Rates
from fsdp_qlora.units import GIB

WHERE = {
    "replicate": "the frozen base on every GPU",
    "shard": "each GPU has its share of the frozen base, blocks gathered ahead of use",
    "shard_offload": "each rank has its share of the frozen base in host memory, blocks gathered ahead of use",
    "stream": "the frozen base in host memory, once per node, blocks copied ahead of use",
}


def where_line(candidate: Candidate) -> str:
    text = f"plan      {candidate.placement}: {WHERE[candidate.placement]}"
    if candidate.placement != "stream":
        return text
    resident = sum(b.resident for b in candidate.blocks)
    head = "resident" if candidate.head_resident else "streamed"
    return f"{text}; {resident} of {len(candidate.blocks)} blocks resident, head {head}, {candidate.staging} buffers"


def kept_line(blocks: tuple[BlockPlan, ...]) -> str:
    counts = Counter((b.keep, "host memory" if b.offloaded else "GPU") for b in blocks)
    if len(counts) == 1:
        ((keep, where),) = counts
        return f"          every block keeps for backward: {keep}, in {where} memory".replace("memory memory", "memory")
    shares = (f"{n} blocks {keep} ({where})" for (keep, where), n in sorted(counts.items(), key=lambda c: -c[1]))
    return f"          kept for backward: {', '.join(shares)}"


def memory_lines(
    parts: Mapping[str, int], placement: Placed, host: Mapping[str, int], limits: tuple[float, float]
) -> list[str]:
    peak = sum(parts.values())
    shares = ", ".join(f"{name} {gib(n)}" for name, n in parts.items() if n >= GIB / 100)
    waits = ", ".join(f"{name} {gib(n)}" for name, n in host.items() if n >= GIB / 100)
    reserved = peak * RESERVED[placement]
    if math.isinf(limits[0]):  # no GPU: all of it is the machine's memory
        return [f"memory    {gib(peak)} GiB for each rank at the peak: {shares}"]
    lines = [
        f"memory    {gib(peak)} GiB on each GPU at the peak, {gib(reserved)} with what the allocator sets aside, "
        f"of {gib(limits[0])}: {shares}"
    ]
    if waits:
        lines.append(f"          {gib(sum(host.values()))} GiB of host memory per node, of {gib(limits[1])}: {waits}")
    return lines


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
        host = f", host {gib(best.host_bytes)}" if best.host_bytes else ""
        texts.append(f"{placement} {best.seconds:.3f} s ({gib(best.device_bytes)} GiB{host})")
    return [f"          instead of: {'; '.join(texts)}"] if texts else []


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f}" if nbytes >= 10 * GIB else f"{nbytes / GIB:.2f}"


def lines(
    candidate: Candidate,
    seconds: float | None,
    facts: Facts,
    rates: Rates | None,
    limits: tuple[float, float],
    found: Mapping[Placed, Found | None],
) -> list[str]:
    """limits: bytes that may be taken on a GPU and of host memory."""
    memory = Memory(facts)
    table = [where_line(candidate), kept_line(candidate.blocks)]
    parts, host = memory.device_parts(candidate), memory.host_parts(candidate)
    table += memory_lines(parts, candidate.placement, host, limits)
    if rates is not None and seconds is not None:
        table.append(time_line(Clock(facts, rates), candidate, seconds))
        table += alternative_lines(facts, candidate.placement, found)
    return table
