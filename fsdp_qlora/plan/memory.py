"""Memory as arithmetic: the bytes on a GPU at the peak of a step or of loading, and the bytes in host memory.

GPU bytes are what `torch.cuda.max_memory_allocated` will say. They are what is held all the time; the arena, as large
as the largest of a few moments: a block in forward or backward with all that blocks before it keep, the head, the
update; and what operators allocate by themselves meanwhile. Or they are those of loading, which comes before the arena.
Sizes are read off the program's own passes (`costs.py`).
"""

import math
from itertools import accumulate
from typing import NamedTuple

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.plan import generic
from fsdp_qlora.plan.candidate import Candidate, Homes, Kinds, Placed
from fsdp_qlora.plan.costs import block_costs, head_cost
from fsdp_qlora.plan.inputs import FLOAT, Facts, adapter_columns, pitch
from fsdp_qlora.plan.loading import Loading
from fsdp_qlora.plan.metering import rounded
from fsdp_qlora.plan.placements import PLACEMENT_COSTS

IN_FLIGHT = 2  # gradient reductions whose buffers are alive at once (`gradient_reduction.IN_FLIGHT`)
TOGETHER = 4  # blocks that are updated at a time (`adapter_group.BLOCKS_PER_UPDATE`)
EXCHANGES = 2  # of which a rank's bytes wait in host memory to be read (`exchange/host.SLOTS`)
THREADS = 2  # that multiply, each with a cuBLAS workspace: Python's and autograd's
# What the allocator reserves over what is allocated. With an arena the last page of a segment and the ends of blocks;
# under FSDP2, whose gathers allocate as they go on streams of their own, and around Hugging Face's own layers a share
# (`PlacementCost.unplaced`).
ENDS = 48 << 20


class Standing(NamedTuple):
    """Bytes of a placement whatever its blocks keep.

    On a GPU: first, late: while the first unit is encoded, and one of the last; step: in a step, but for its peak.
    host: of a node's host memory, but for what is offloaded."""

    first: int
    late: int
    step: int
    host: int

    def device_bytes(self, peak: int) -> int:
        return max(self.first, self.with_residents(peak))

    def with_residents(self, peak: int) -> int:
        """As `device_bytes`, without the moment of loading before any block is: each resident block adds its bytes."""
        return max(self.late, self.step + peak)


class Memory:
    """The bytes of candidates for one model and run; what does not depend on the candidate is computed once."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.of = block_costs(facts) if facts.fused else generic.layer_costs(facts)
        self.head = head_cost(facts) if facts.fused else generic.head_cost(facts)
        self.adapters = facts.all_adapters * facts.compute_bytes + _factors(facts)
        self.loading = Loading(facts)
        owned = -(-facts.all_adapters // facts.ranks)
        self.masters = facts.master_bytes * owned
        gradient = FLOAT * -(-facts.adapter_parameters // facts.ranks)
        together = min(TOGETHER, facts.layers) if facts.master_bytes < FLOAT else 0
        self.unfolded = together * gradient  # master copies, during the update
        # A block's gradient is there from its backward to the end of the step; over micro-batches from the first on.
        self.gradient = 0 if facts.accumulation > 1 else gradient
        self.gradients = 0 if facts.accumulation == 1 else facts.layers * gradient
        self.owned = self.masters + int(owned * facts.optimizer_state_bytes) + self._unreduced() + self.gradients
        if facts.exchange_by_host:  # what waits to be added
            self.owned += FLOAT * facts.largest_adapters // facts.ranks // (1 if facts.ranks > 2 else 2)
        # Of a node's host memory.
        self.pages = facts.paged_bytes * facts.all_adapters * facts.local_ranks // facts.ranks
        summed = facts.no_sync and facts.accumulation > 1  # what is reduced once a step has no place in the arena
        reduction = 0 if facts.ranks == 1 else _reduction(facts)
        self.reduction, self.unplaced = (0, (IN_FLIGHT + 1) * reduction) if summed else (reduction, 0)
        gradients = facts.largest_adapters * facts.compute_bytes  # as autograd leaves them
        self.sending = gradients + (self.reduction or gradients)  # beside those that are in flight
        self.stream = rounded(facts.tokens * facts.hidden * facts.compute_bytes)  # what one block hands to the next
        self.scratch = _scratch(facts)
        self.workspace = THREADS * facts.workspace_bytes
        self.always = self.adapters + self.owned + self.scratch + self.workspace
        self._kept = {kind: cost.kept for kind, cost in self.of.items()}
        self._away = {kind: cost.away for kind, cost in self.of.items()}
        self._standing: dict[tuple[Placed, Homes], Standing] = {}
        self._peaks: dict[tuple[int, Kinds], int] = {}

    def step_parts(self, candidate: Candidate, arena: int | None = None) -> dict[str, int]:
        """What is on a GPU at the worst moment of a step. arena: its bytes, where they are known."""
        cost, homes = PLACEMENT_COSTS[candidate.placement], candidate.homes
        kept, working, gradients = self._worst(candidate.kinds, cost.gathered_head_bytes(self.facts))
        working = working if arena is None else arena - kept - gradients
        return {
            "frozen base": cost.resident_bytes(self.facts, homes),
            "frozen base on its way": cost.moving_bytes(self.facts, homes),
            "adapters": self.adapters,
            "gradients, masters, optimizer": self.owned + gradients,
            "decoded weights, cuBLAS": self.scratch + self.workspace,
            "kept for backward": kept,
            "working": working + self._loose(candidate.kinds),
        }

    def arena(self, candidate: Candidate) -> int:
        """The least bytes of the arena: of the tensors that are placed, most that are alive at once."""
        return sum(self._worst(candidate.kinds, PLACEMENT_COSTS[candidate.placement].gathered_head_bytes(self.facts)))

    def limit(self, placement: Placed, device_bytes: float) -> int:
        """Of what PyTorch may reserve, how much may be allocated."""
        cost = PLACEMENT_COSTS[placement]
        if self.facts.fused and not cost.shards:
            return int(device_bytes) - ENDS
        return int(device_bytes / cost.unplaced)

    def reserved(self, placement: Placed, allocated: int) -> int:
        """What PyTorch reserves where so much is allocated."""
        cost = PLACEMENT_COSTS[placement]
        if self.facts.fused and not cost.shards:
            return allocated + ENDS
        return math.ceil(allocated * cost.unplaced)

    def loading_parts(self, candidate: Candidate) -> dict[str, int]:
        """What is on a GPU when the unit is encoded that takes most, those before it being where they stay."""
        cost, homes, of = PLACEMENT_COSTS[candidate.placement], candidate.homes, self.loading
        resident = cost.resident_bytes(self.facts, homes)
        before_head = resident - cost.resident_head_bytes(self.facts, homes)
        frozen, encoding = max((0, of.first), (before_head, of.block), (before_head, of.head), key=sum)
        return {
            "frozen base": frozen,
            "adapters": self.adapters,
            "masters": self.masters,
            "unit being encoded": encoding,
        }

    def device_bytes(self, candidate: Candidate) -> int:
        """The larger sum of `step_parts` and `loading_parts`."""
        standing = self.standing(candidate.placement, candidate.homes)
        return standing.device_bytes(self.peak(candidate.placement, candidate.kinds))

    def host_parts(self, candidate: Candidate) -> dict[str, int]:
        """Bytes in host memory of a node, all its ranks together, by name."""
        parts = self._frozen_on_host(candidate.placement, candidate.homes)
        parts["kept for backward"] = self.offloaded(candidate.kinds)
        if self.facts.paged_bytes:
            parts["optimizer"] = self.pages
        if self.facts.exchange_by_host:
            parts["exchange"] = self._exchanged()
        return parts

    def host_bytes(self, candidate: Candidate) -> int:
        return sum(self.host_parts(candidate).values())

    def standing(self, placement: Placed, homes: Homes) -> Standing:
        """What is there whatever blocks keep. Computed once for each: there are few."""
        found = self._standing.get((placement, homes))
        if found is None:
            found = self._standing[placement, homes] = self._stands(placement, homes)
        return found

    def peak(self, placement: Placed, kinds: Kinds) -> int:
        """Bytes kept, working and of gradients at the worst moment, whatever is resident."""
        gathered = PLACEMENT_COSTS[placement].gathered_head_bytes(self.facts)
        peak = self._peaks.get((gathered, kinds))
        if peak is None:
            peak = self._peaks[gathered, kinds] = sum(self._worst(kinds, gathered)) + self._loose(kinds)
        return peak

    def away(self, kinds: Kinds) -> int:
        """Bytes in host memory of what a rank's blocks keep there."""
        return sum(map(self._away.__getitem__, kinds))

    def offloaded(self, kinds: Kinds) -> int:
        """The same of all ranks of a node."""
        return self.away(kinds) * self.facts.local_ranks

    def _stands(self, placement: Placed, homes: Homes) -> Standing:
        facts, cost = self.facts, PLACEMENT_COSTS[placement]
        resident = cost.resident_bytes(facts, homes)
        late = max(self.loading.block, self.loading.head) - cost.resident_head_bytes(facts, homes)
        host = sum(self._frozen_on_host(placement, homes).values())
        return Standing(
            self.adapters + self.masters + self.loading.first,
            resident + self.adapters + self.masters + late,
            resident + cost.moving_bytes(facts, homes) + self.always,
            host + self.pages + (self._exchanged() if facts.exchange_by_host else 0),
        )

    def _frozen_on_host(self, placement: Placed, homes: Homes) -> dict[str, int]:
        facts, cost = self.facts, PLACEMENT_COSTS[placement]
        embedding = facts.embedding_bytes * cost.embeddings(facts) if facts.embedding_on_host else 0
        return {"frozen base": cost.host_bytes(facts, homes), "embedding": embedding}

    def _exchanged(self) -> int:
        return EXCHANGES * (self.facts.ranks - 1) * FLOAT * self.facts.largest_adapters

    def _loose(self, kinds: Kinds) -> int:
        """Most that operators allocate by themselves, beside the arena."""
        return max(self.head.loose, *(self.of[kind].loose for kind in set(kinds))) + self.unplaced

    def _unreduced(self) -> int:
        facts = self.facts
        return FLOAT * facts.all_adapters if facts.no_sync and facts.accumulation > 1 else 0

    def _worst(self, kinds: Kinds, head_gathered: int) -> tuple[int, int, int]:
        """(bytes kept, of working tensors, of gradients) at the worst moment of a micro-batch and the update after it.

        Of blocks alike it is the last that has most kept before it, or the first that has most gradients behind it."""
        layers, backwards = len(kinds), kinds[::-1]
        sizes = {kind: self.of[kind] for kind in dict.fromkeys(kinds)}
        before = list(accumulate(map(self._kept.__getitem__, kinds), initial=0))
        restored = max(size.away for size in sizes.values())
        every = layers * self.gradient
        first_away = min((kinds.index(kind) for kind, size in sizes.items() if size.away), default=layers)
        head = (before[-1], self.head.arena + head_gathered + restored, 0)
        worst = max(head, (0, 0, every + self.unfolded), key=sum)
        last = [layers - 1 - backwards.index(kind) for kind in sizes]
        first = [kinds.index(kind) for kind in dict.fromkeys(backwards)]
        embedded = self.stream if self._away[kinds[0]] else 0  # Hugging Face's loop holds the first block's input
        for i in {*last, *first, *range(max(0, layers - 1 - IN_FLIGHT), layers)}:
            size = sizes[kinds[i]]
            going = restored if i > first_away else 0  # what was offloaded last is let go when the next is offloaded
            forward = (before[i], size.forward_bytes + going + (embedded if i else 0), 0)
            behind = every - (i + 1) * self.gradient
            flying = min(IN_FLIGHT, layers - 1 - i) * self.reduction
            backward = (before[i + 1], size.backward_bytes + size.away + restored, behind + flying)
            sent = (before[i], self.stream + self.sending, behind + flying)
            worst = max(worst, forward, backward, sent, key=sum)
        return worst


def _factors(facts: Facts) -> int:
    """Bytes of what magnitudes come to, a number for each output (`fused.Linears`)."""
    outputs = facts.qkv + 2 * facts.hidden + 2 * facts.intermediate
    return FLOAT * outputs * facts.layers if ADAPTERS[facts.adapter].reads_norms else 0


def _reduction(facts: Facts) -> int:
    """Bytes of the largest block's gradients on their way; this rank's slice of the sum counts as its gradient where it
    becomes that. Sums over micro-batches are float32 already, and counted as such (`_unreduced`)."""
    whole, part = facts.largest_adapters * facts.sent_bytes, facts.largest_adapters * facts.reduce_bytes // facts.ranks
    if facts.no_sync and facts.accumulation > 1:
        return part if facts.reduce_bytes == FLOAT else whole + part
    becomes = facts.reduce_bytes == FLOAT and facts.accumulation == 1
    return whole if becomes else whole + part


def _scratch(facts: Facts) -> int:
    """Bytes of `fused.Scratch`: the weights of one input together, adapters beside and below them; unfused, the largest
    linear decoded."""
    f = facts
    if not f.fused:
        q = f.qkv if f.qkv_linears == 1 else f.queries
        return max(q, f.intermediate * (3 - f.gate_up_linears)) * f.hidden * f.compute_bytes
    ranks = f.lora_rank_qkv, f.lora_rank_o, f.lora_rank_gate_up, f.lora_rank_down
    qkv, o, gate_up, down = map(adapter_columns, ranks)
    laid = (
        (f.qkv + qkv) * pitch(f.hidden + qkv),
        (f.hidden + o) * pitch(f.queries + o),
        (2 * f.intermediate + gate_up) * pitch(f.hidden + gate_up),
        (f.hidden + down) * pitch(f.intermediate + down),
    )
    return max(laid) * f.compute_bytes
