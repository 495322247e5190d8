"""Time as arithmetic: the seconds of an optimizer step, from the work of its blocks and the rates of the machine.

What computes and what copies are two queues that wait for each other: a block waits for its bytes, a copy for a buffer
that is free. `Clock.seconds` walks one micro-batch through both, block by block, forward and back; everything that does
not depend on the candidate is computed once, so that the search can afford thousands of walks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fsdp_qlora.kernels.cost import Cost
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.memory import Candidate, Memory
from fsdp_qlora.plan.update import gradient_bytes, update_bytes

PREFETCH = 2  # blocks that FSDP2 gathers ahead (`placement.PREFETCH`)
SKINNY_BANDWIDTH = 0.8  # of copy bandwidth that an adapter's products reach: 22 ms for 18 ms of bytes (performance.md)
SKINNY_MATMUL = 0.5  # of the matmul rate where these products are bound by arithmetic: one operand is R wide
# Over seconds a card clocks lower than in the 20 ms in which its rates are measured, and its kernels have small gaps:
# seven configurations of 2026-11-24 on H200s took 5 to 8 % longer than their parts.
SUSTAINED = 1.06
# Seconds the GPU idles at a step's one wait and until the host has queued work again (performance.md), measured before
# the update was queued ahead: too much since, but for optimizers that need the host's word.
STEP_WAIT = 0.004


@dataclass(frozen=True)
class Rates:
    """What a machine does, slowest rank of all. Bytes per second unless another unit is named; 0.0: not measured.

    matmul_forward, matmul_backward: FLOP/s of a block's products with the weight transposed and not, at the run's
    tokens. attention_forward, attention_backward: FLOP/s, counting the keys that are seen. copy: in device memory, read
    and written both counted. dequantize: stored bytes read and numbers written. h2d: pinned host memory to the device;
    h2d_both, d2h_both: each direction while the other is busy as well; all ranks of the node at once. gather,
    reduce: received by a rank in an all-gather and a reduce-scatter over all ranks. crowding: how many times longer a
    product takes while a gather runs beside it. launch: seconds of the host per kernel or op.
    """

    matmul_forward: float
    matmul_backward: float
    attention_forward: float
    attention_backward: float
    copy: float
    dequantize: float
    h2d: float
    h2d_both: float
    d2h_both: float
    gather: float
    reduce: float
    crowding: float
    launch: float


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
        embedding = facts.tokens * facts.hidden * facts.stream_bytes / rates.h2d if facts.embedding_on_host else 0.0
        self.head = self._of(self.memory.head.cost) + embedding
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
        self.beside = update_bytes(facts) / rates.copy + STEP_WAIT + self.reduction + late

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
        away = sum(self.memory.of[b.keep, b.offloaded].away for b in candidate.blocks)
        exchanged = (self.reduction_in + self.publish_in) * self.facts.layers
        if candidate.placement in ("shard", "shard_offload"):
            blocks = self._passes() * self.facts.layers * self._gather(candidate)
            return blocks + self._gather_head(candidate) + away / self.rates.h2d + exchanged, away / self.rates.h2d
        streamed = sum(not b.resident for b in candidate.blocks)
        head = not candidate.head_resident  # in a buffer that would have kept a block where the passes turn round
        moved = max(0, 2 * (streamed - candidate.staging) + head) * self.facts.block_bytes
        moved += self.facts.head_bytes if head else 0
        return (moved + away) / self.rates.h2d + exchanged, away / self.rates.h2d

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

    def _gather(self, candidate: Candidate) -> float:
        """Seconds until a block is whole. Offloaded shards come over the link that the others' bytes use as well, in
        both directions where there is no peer access."""
        f, r = self.facts, self.rates
        received = f.block_bytes * (f.shards - 1) / f.shards
        seconds = self._over(received, r.gather)
        if candidate.placement == "shard_offload":
            through_host = received if r.gather < r.h2d else 0.0
            seconds = max(seconds, (f.block_bytes / f.shards + through_host) / r.h2d_both)
        return seconds

    def _passes(self) -> int:
        """In how many of a micro-batch's two passes blocks are gathered."""
        return 2 if self.facts.reshard else 1

    def _gather_head(self, candidate: Candidate) -> float:
        """The head, and an embedding that is not in host memory, are gathered when they are wanted."""
        f = self.facts
        tables = f.head_bytes + (0 if f.embedding_on_host else f.embedding_bytes * (1 if f.head_bytes else 2))
        return self._gather(candidate) * tables / f.block_bytes

    def _walk(self, candidate: Candidate) -> float:
        gathered = candidate.placement in ("shard", "shard_offload")
        crowding = self._crowding(candidate)
        if gathered:
            unit = self._gather(candidate)
            walk = Walk(self, candidate, crowding, PREFETCH + 1, unit, self._gather_head(candidate), keeps=False)
        else:
            unit, head = self.facts.block_bytes / self.rates.h2d, 0.0
            walk = Walk(self, candidate, crowding, candidate.staging, unit, head, keeps=True)
        return walk.run()

    def _crowding(self, candidate: Candidate) -> float:
        """How many times longer blocks take because NCCL's kernels have some of the multiprocessors."""
        arithmetic = self.arithmetic(candidate)
        moving = 0.0 if self.facts.exchange_by_host else self.reduction * self.facts.layers + self.publish
        if candidate.placement in ("shard", "shard_offload"):
            moving += self._passes() * self.facts.layers * self._gather(candidate)
        return 1 + (max(self.rates.crowding, 1.0) - 1) * min(1.0, moving / arithmetic)


class Walk:
    """One micro-batch: blocks forward, head, blocks back, with the link's copies beside them.

    unit: seconds to bring a block. buffers: units that may be there at once. keeps: the last units of a pass are there
    for the next one, which turns round, and are not brought again."""

    def __init__(
        self,
        clock: Clock,
        candidate: Candidate,
        crowding: float,
        buffers: int,
        unit: float,
        head: float,
        keeps: bool,
    ) -> None:
        self.clock, self.candidate, self.crowding = clock, candidate, crowding
        self.buffers, self.unit, self.head, self.keeps = buffers, unit, head, keeps
        self.blocks = candidate.blocks
        facts, rates = clock.facts, clock.rates
        self.streamed = [i for i, b in enumerate(self.blocks) if not (keeps and b.resident)]
        self.streams_head = keeps and not candidate.head_resident
        self.head_copy = facts.head_bytes / rates.h2d if self.streams_head else 0.0
        self.slower = rates.h2d / rates.h2d_both  # while the other direction is busy
        self.slower_out = rates.h2d / rates.d2h_both
        self.away = [clock.memory.of[b.keep, b.offloaded].away / rates.h2d for b in self.blocks]
        self.now = self.in_free = self.out_free = 0.0

    def run(self) -> float:
        self._forward()
        self._backward()
        return self.now

    def _bring(self, seconds: float, earliest: float) -> float:
        """When a copy to the GPU is done that may start at `earliest`."""
        start = max(self.in_free, earliest)
        self.in_free = start + seconds * (self.slower if self.out_free > start else 1.0)
        return self.in_free

    def _take_out(self, seconds: float) -> float:
        start = max(self.out_free, self.now)
        self.out_free = start + seconds * (self.slower_out if self.in_free > start else 1.0)
        return self.out_free

    def _exchange(self, out: float, back: float) -> None:
        """Adapters through host memory: the link's other bytes wait for theirs, and nothing here does."""
        if back:
            self._bring(back, self._take_out(out))

    def _forward(self) -> None:
        order, there = self._arrivals([*self.streamed, *([-1] if self.streams_head else [])], self.keeps, 0.0)
        left = 0.0
        for i, block in enumerate(self.blocks):
            self.now = max(self.now, there.get(i, 0.0)) + self.clock.forward[block.keep] * self.crowding
            if i in there:
                self._next(order, there)
            self._exchange(self.clock.publish_out, self.clock.publish_in)
            if self.away[i]:
                self.now = max(self.now, left)  # the block parked before is out before this one's memory is given back
                left = self._take_out(self.away[i])
        self.now = max(self.now, there.get(-1, 0.0)) + self.clock.head + self.head

    def _backward(self) -> None:
        held = self.buffers - self.streams_head if self.keeps else 0
        if not self.keeps and not self.clock.facts.reshard:
            held = len(self.streamed)
        order, there = self._arrivals(self.streamed[::-1], self.keeps, self.now, held)
        parked = [i for i, seconds in enumerate(self.away) if seconds]
        fetched: dict[int, float] = {}
        reduced = self.now
        if parked and not self.away[-1]:  # the first block back parked nothing, and starts the copy of what was last
            fetched[parked[-1]] = self._bring(self.away[parked[-1]], max(self.now, self.out_free))
        for i in range(len(self.blocks) - 1, -1, -1):
            if self.away[i]:
                self._fetch(parked, fetched)
            ready = max(there.get(i, 0.0), fetched.get(i, 0.0))
            self.now = max(self.now, ready) + self.clock.backward[self.blocks[i].keep] * self.crowding
            if i in there:
                self._next(order, there)
            self._exchange(self.clock.reduction_out, self.clock.reduction_in)
            reduced = max(reduced, self.now) + self.clock.reduction
        self.now = max(self.now, reduced - self.clock.reduction)

    def _fetch(self, parked: list[int], fetched: dict[int, float]) -> None:
        """The block's own tensors, if they are not on their way, and those of the block parked before it."""
        for i in (parked.pop(), *parked[-1:]):
            if i not in fetched:
                fetched[i] = self._bring(self.away[i], max(self.now, self.out_free))

    def _arrivals(
        self, units: Sequence[int], keeps: bool, start: float, held: int | None = None
    ) -> tuple[list[int], dict[int, float]]:
        """(units still to bring, last first; unit -> when it is there, of those that are or may start now)."""
        held = (self.buffers if keeps else 0) if held is None else held
        there = dict.fromkeys(units[:held], 0.0)
        order = list(units[held:])[::-1]
        for _ in range(self.buffers - held):
            self._next(order, there, start)
        return order, there

    def _next(self, order: list[int], there: dict[int, float], start: float | None = None) -> None:
        """A buffer is free: bring the next unit."""
        if order:
            unit = order.pop()
            there[unit] = self._bring(self.head_copy if unit == -1 else self.unit, self.now if start is None else start)
