"""Time as arithmetic: the seconds of an optimizer step, from the work of its blocks and the rates of the machine.

What computes and what copies are two queues that wait for each other: a block waits for its bytes, a copy for a buffer
that is free. `Clock.seconds` walks one micro-batch through both, block by block, forward and back; everything that does
not depend on the candidate is computed once, so that the search can afford thousands of walks.
"""

from collections.abc import Sequence

from fsdp_qlora.kernels.cost import Cost
from fsdp_qlora.plan.candidate import Candidate, Homes, Kinds, Placed
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.placements import PLACEMENT_COSTS, PREFETCH, PlacementCost
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.simulate import NEVER, Link, Passes, Units, Walk
from fsdp_qlora.plan.update import gradient_bytes, update_bytes

SKINNY_BANDWIDTH = 0.8  # of copy bandwidth that an adapter's products reach: 22 ms for 18 ms of bytes (performance.md)
SKINNY_MATMUL = 0.5  # of the matmul rate where these products are bound by arithmetic: one operand is R wide
# Over seconds a card clocks lower than in the 20 ms in which its rates are measured, and its kernels have small gaps:
# seven configurations of 2026-11-24 on H200s took 5 to 8 % longer than their parts.
SUSTAINED = 1.06
# Seconds the GPU idles at a step's one wait and until the host has queued work again (performance.md), measured before
# the update was queued ahead: too much since, but for optimizers that need the host's word.
STEP_WAIT = 0.004


class Clock:
    """Seconds of candidates for one model, run and machine."""

    def __init__(self, facts: Facts, rates: Rates) -> None:
        self.facts, self.rates, self.memory = facts, rates, Memory(facts)
        summing = Cost(bytes=gradient_bytes(facts))
        on_gpu = {keep: cost for (keep, offloaded), cost in self.memory.of.items() if not offloaded}
        self.forward = {keep: self._of(cost.forward) for keep, cost in on_gpu.items()}
        self.backward = {keep: self._of(cost.backward + summing) for keep, cost in on_gpu.items()}
        if not facts.fused and facts.remat:  # autograd under checkpointing computes the whole forward again
            self.backward = {keep: seconds + self.forward[keep] for keep, seconds in self.backward.items()}
        embedding = facts.usual_tokens * facts.hidden * facts.stream_bytes if facts.embedding_on_host else 0
        self.head = self._of(self.memory.head.cost) + embedding / rates.h2d
        others = (facts.ranks - 1) / facts.ranks
        gradients, values = facts.adapter_parameters * facts.sent_bytes, facts.all_adapters * facts.compute_bytes
        if facts.exchange_by_host:  # out and in one after the other; new values go out once for all
            self.reduction = gradients * others * (1 / rates.d2h_both + 1 / rates.h2d_both)
            self.publish = values * (1 / facts.ranks / rates.d2h_both + others / rates.h2d_both)
        else:
            self.reduction = self._over(gradients * others, rates.reduce)
            self.publish = self._over(values * others, rates.gather)
        # Of it, what the link carries from and to the GPU for each block backward and forward.
        by_link = facts.exchange_by_host / rates.h2d
        self.reduction_out = self.reduction_in = gradients * others * by_link
        self.publish_out = values / facts.ranks * by_link / facts.layers / facts.accumulation
        self.publish_in = self.publish_out * (facts.ranks - 1)
        # New adapters travel behind the next forward; only what outlasts it is waited for.
        late = max(self.publish / facts.layers, self.publish - facts.layers * min(self.forward.values()))
        first = next(iter(on_gpu.values()))  # launched ahead in the forward that it is part of
        once = facts.layers * (self._of(first.forward + first.once) - self._of(first.forward))
        self._passes = {kind: self.passes(kind[0]) for kind in self.memory.of}
        self._computing: dict[Kinds, float] = {}
        away = facts.fullness / rates.h2d  # seconds for a byte of the largest micro-batch, in the usual one
        self._away = {kind: cost.away * away for kind, cost in self.memory.of.items()}
        self.beside = update_bytes(facts) / rates.copy + STEP_WAIT + self.reduction + late + once

    def seconds(self, candidate: Candidate) -> float:
        """Of an optimizer step."""
        return self.step(candidate.placement, candidate.kinds, candidate.stays, candidate.homes)

    def step(self, placement: Placed, kinds: Kinds, stays: Sequence[bool], homes: Homes, limit: float = NEVER) -> float:
        """The same. stays: which blocks are resident. `NEVER` where it is more than `limit`."""
        walk = self._walk(placement, kinds, stays, homes)
        micro = walk.run((limit - self.beside) / self.facts.accumulation)
        return micro * self.facts.accumulation + self.beside

    def bound(self, candidate: Candidate) -> float:
        """No walk takes less: the longer of arithmetic and copies, and what is beside both."""
        return self.least(candidate.placement, candidate.kinds, candidate.homes)

    def least(self, placement: Placed, kinds: Kinds, homes: Homes) -> float:
        """The bound of such blocks."""
        micro = max(self.computing(kinds), *self.copying(placement, kinds, homes))
        return micro * self.facts.accumulation + self.beside

    def unhindered(self, kinds: Kinds) -> float:
        """Return the seconds of a step of such blocks that waits for no copy of bytes: no walk takes less."""
        return self.computing(kinds) * self.facts.accumulation + self.beside

    def arithmetic(self, candidate: Candidate) -> float:
        """Seconds of a micro-batch that the GPU computes, with nothing to wait for."""
        return self.computing(candidate.kinds)

    def computing(self, kinds: Kinds) -> float:
        """The same, of such blocks."""
        found = self._computing.get(kinds)
        if found is None:
            found = self._computing[kinds] = sum(map(self._passes.__getitem__, kinds)) + self.head
        return found

    def passes(self, keep: str) -> float:
        """Seconds of a block's two passes at a keep level."""
        return self.forward[keep] + self.backward[keep]

    def link(self, candidate: Candidate) -> tuple[float, float]:
        """Seconds of a micro-batch in which bytes come to the GPU, and in which kept tensors leave it."""
        return self.copying(candidate.placement, candidate.kinds, candidate.homes)

    def copying(self, placement: Placed, kinds: Kinds, homes: Homes) -> tuple[float, float]:
        """The same, of such blocks."""
        away = self.memory.away(kinds) * self.facts.fullness
        exchanged = (self.reduction_in + self.publish_in) * self.facts.layers
        arrivals = PLACEMENT_COSTS[placement].arrival_seconds(self.facts, self.rates, homes)
        return arrivals + away / self.rates.h2d + exchanged, away / self.rates.h2d

    def _of(self, cost: Cost) -> float:
        """Seconds of some work: its kernels one after the other, or their launches if those take longer."""
        r = self.rates
        seconds = cost.forward / r.matmul_forward + cost.backward / r.matmul_backward
        seconds += cost.attention / r.attention_forward + cost.attention_backward / r.attention_backward
        seconds += cost.bytes / r.copy + cost.dequantized / r.dequantize
        skinny = (cost.skinny_bytes / (SKINNY_BANDWIDTH * r.copy), cost.skinny / (SKINNY_MATMUL * r.matmul_forward))
        return max(SUSTAINED * (seconds + max(skinny)), cost.launches * r.launch)

    @staticmethod
    def _over(nbytes: float, rate: float) -> float:
        return nbytes / rate if nbytes else 0.0

    def _walk(self, placement: Placed, kinds: Kinds, stays: Sequence[bool], homes: Homes) -> Walk:
        facts, rates, cost = self.facts, self.rates, PLACEMENT_COSTS[placement]
        crowding = self._crowding(cost, kinds)
        forward = {keep: seconds * crowding for keep, seconds in self.forward.items()}
        backward = {keep: seconds * crowding for keep, seconds in self.backward.items()}
        passes = Passes(
            [forward[keep] for keep, _ in kinds],
            [backward[keep] for keep, _ in kinds],
            [self._away[kind] for kind in kinds],
            self.head,
            self.reduction,
        )
        if cost.shards:
            unit, gather, head = cost.gather_seconds(facts, rates), cost.gather_head_seconds(facts, rates), 0.0
            units = Units(range(len(kinds)), PREFETCH + 1, has_head=False, turns=False, holds=not facts.reshard)
        else:
            unit, gather, head = facts.block_bytes / rates.h2d, 0.0, facts.head_bytes / rates.h2d
            streamed = [i for i, resident in enumerate(stays) if not resident]
            units = Units(streamed, homes.staging, not homes.head_resident, turns=True, holds=False)
        slower = rates.h2d / rates.h2d_both, rates.h2d / rates.d2h_both  # while the other direction is busy
        publish, reduction = (self.publish_out, self.publish_in), (self.reduction_out, self.reduction_in)
        return Walk(passes, Link(unit, head, gather, *slower, publish, reduction), units)

    def _crowding(self, cost: PlacementCost, kinds: Kinds) -> float:
        """How many times longer blocks take because NCCL's kernels have some of the multiprocessors."""
        arithmetic = self.computing(kinds)
        moving = 0.0 if self.facts.exchange_by_host else self.reduction * self.facts.layers + self.publish
        moving += cost.passes(self.facts) * self.facts.layers * cost.gather_seconds(self.facts, self.rates)
        return 1 + (max(self.rates.crowding, 1.0) - 1) * min(1.0, moving / arithmetic)
