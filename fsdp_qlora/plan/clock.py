"""Time as arithmetic: the seconds of an optimizer step, from the work of its blocks and the rates of the machine.

What computes and what copies are two queues that wait for each other: a block waits for its bytes, a copy for a buffer
that is free. `Clock.seconds` walks one micro-batch through both, block by block, forward and back; everything that does
not depend on the candidate is computed once, so that the search can afford thousands of walks.
"""

from fsdp_qlora.kernels.cost import Cost
from fsdp_qlora.plan.candidate import Candidate
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.placements import PLACEMENT_COSTS, PREFETCH
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.simulate import Walk
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
        self.beside = update_bytes(facts) / rates.copy + STEP_WAIT + self.reduction + late + once

    def seconds(self, candidate: Candidate) -> float:
        """Of an optimizer step."""
        micro = self._walk(candidate)
        return micro * self.facts.accumulation + self.beside

    def bound(self, candidate: Candidate) -> float:
        """No walk takes less: the longer of arithmetic and copies, and what is beside both."""
        micro = max(self.arithmetic(candidate), *self.link(candidate))
        return micro * self.facts.accumulation + self.beside

    def arithmetic(self, candidate: Candidate) -> float:
        """Seconds of a micro-batch that the GPU computes, with nothing to wait for."""
        return sum(self.passes(b.keep) for b in candidate.blocks) + self.head

    def passes(self, keep: str) -> float:
        """Seconds of a block's two passes at a keep level."""
        return self.forward[keep] + self.backward[keep]

    def link(self, candidate: Candidate) -> tuple[float, float]:
        """Seconds of a micro-batch in which bytes come to the GPU, and in which kept tensors leave it."""
        away = sum(self.memory.of[b.keep, b.offloaded].away for b in candidate.blocks) * self.facts.fullness
        exchanged = (self.reduction_in + self.publish_in) * self.facts.layers
        arrivals = PLACEMENT_COSTS[candidate.placement].arrival_seconds(self.facts, self.rates, candidate)
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

    def _walk(self, candidate: Candidate) -> float:
        facts, rates, cost = self.facts, self.rates, PLACEMENT_COSTS[candidate.placement]
        crowding = self._crowding(candidate)
        if cost.shards:
            unit, head = cost.gather_seconds(facts, rates), cost.gather_head_seconds(facts, rates)
            walk = Walk(self, candidate, crowding, PREFETCH + 1, unit, head, keeps=False)
        else:
            unit = facts.block_bytes / rates.h2d
            walk = Walk(self, candidate, crowding, candidate.staging, unit, 0.0, keeps=True)
        return walk.run()

    def _crowding(self, candidate: Candidate) -> float:
        """How many times longer blocks take because NCCL's kernels have some of the multiprocessors."""
        arithmetic = self.arithmetic(candidate)
        moving = 0.0 if self.facts.exchange_by_host else self.reduction * self.facts.layers + self.publish
        cost = PLACEMENT_COSTS[candidate.placement]
        moving += cost.passes(self.facts) * self.facts.layers * cost.gather_seconds(self.facts, self.rates)
        return 1 + (max(self.rates.crowding, 1.0) - 1) * min(1.0, moving / arithmetic)
