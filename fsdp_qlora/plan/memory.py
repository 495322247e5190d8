"""Memory as arithmetic: the bytes on a GPU at the peak of a step or of loading, and the bytes in host memory.

GPU bytes are what `torch.cuda.max_memory_allocated` will say. They are what is held all the time; the arena, as large
as the largest of a few moments: a block in forward or backward with all that blocks before it keep, the head, the
update; and what operators allocate by themselves meanwhile. Or they are those of loading, which comes before the arena.
Sizes are read off the program's own passes (`costs.py`).
"""

import math
from collections.abc import Sequence
from itertools import accumulate

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.plan import generic
from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Placed
from fsdp_qlora.plan.costs import block_costs, head_cost
from fsdp_qlora.plan.inputs import FLOAT, Facts, beside, pitch
from fsdp_qlora.plan.loading import Loading
from fsdp_qlora.plan.placements import PLACEMENT_COSTS

IN_FLIGHT = 2  # gradient reductions whose buffers are alive at once (`gradient_reduction.IN_FLIGHT`)
TOGETHER = 4  # blocks that are updated at a time (`adapter_group.BLOCKS_PER_UPDATE`)
EXCHANGES = 2  # of which a rank's bytes wait in host memory to be read (`exchange/host.SLOTS`)
THREADS = 2  # that multiply, each with a cuBLAS workspace: Python's and autograd's
# What the allocator reserves over what is allocated. With an arena the last page of a segment and the ends of blocks;
# under FSDP2, whose gathers allocate as they go on streams of their own, and around Hugging Face's own layers a share
# (`PlacementCost.unplaced`).
ENDS = 48 << 20


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
        self.owned = self.masters + int(owned * facts.state_bytes) + self._unreduced() + self.gradients
        if facts.exchange_by_host:  # what waits to be added
            self.owned += FLOAT * facts.largest_adapters // facts.ranks // (1 if facts.ranks > 2 else 2)
        self.reduction = 0 if facts.ranks == 1 else _reduction(facts)
        self.scratch = _scratch(facts)
        self.workspace = THREADS * facts.workspace_bytes
        self.always = self.adapters + self.owned + self.scratch + self.workspace

    def step_parts(self, candidate: Candidate, arena: int | None = None) -> dict[str, int]:
        """What is on a GPU at the worst moment of a step. arena: its bytes, where they are known."""
        kept, working, gradients = self._peak(candidate.blocks, self._head_gathered(candidate))
        working = working if arena is None else arena - kept - gradients
        return {
            "frozen base": self._resident(candidate),
            "frozen base on its way": self._moving(candidate),
            "adapters": self.adapters,
            "gradients, masters, optimizer": self.owned + gradients,
            "decoded weights, cuBLAS": self.scratch + self.workspace,
            "kept for backward": kept,
            "working": working + self._loose(candidate.blocks),
        }

    def arena(self, candidate: Candidate) -> int:
        """The least bytes of the arena: of the tensors that are placed, most that are alive at once."""
        return sum(self._peak(candidate.blocks, self._head_gathered(candidate)))

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
        before_head = self._resident(candidate) - self._head_here(candidate)
        of = self.loading
        frozen, encoding = max((0, of.first), (before_head, of.block), (before_head, of.head), key=sum)
        return {
            "frozen base": frozen,
            "adapters": self.adapters,
            "masters": self.masters,
            "unit being encoded": encoding,
        }

    def device_bytes(self, candidate: Candidate, peak: int | None = None) -> int:
        """The larger sum of `step_parts` and `loading_parts`. peak: what `peak` says of such blocks, if known."""
        first = self.adapters + self.masters + self.loading.first
        return max(first, self.with_residents(candidate, self.peak(candidate) if peak is None else peak))

    def with_residents(self, candidate: Candidate, peak: int) -> int:
        """As `device_bytes`, without the moment of loading before any block is: each resident block adds its bytes."""
        resident = self._resident(candidate)
        late = max(self.loading.block, self.loading.head) - self._head_here(candidate)
        step = self._moving(candidate) + self.always + peak
        return resident + max(step, self.adapters + self.masters + late)

    def peak(self, candidate: Candidate) -> int:
        """Bytes kept, working and of gradients at the worst moment: alike for all candidates of a placement with such
        kinds of block in such an order, whatever is resident."""
        return self.arena(candidate) + self._loose(candidate.blocks)

    def _loose(self, blocks: Sequence[BlockPlan]) -> int:
        """Most that operators allocate by themselves, beside the arena."""
        return max(self.head.loose, *(self.of[kind].loose for kind in {(b.keep, b.offloaded) for b in blocks}))

    def host_parts(self, candidate: Candidate) -> dict[str, int]:
        """Bytes in host memory of a node, all its ranks together, by name."""
        facts, blocks, cost = self.facts, candidate.blocks, PLACEMENT_COSTS[candidate.placement]
        embedding = facts.embedding_bytes * cost.embeddings(facts) if facts.embedding_on_host else 0
        frozen = cost.host_bytes(facts, candidate)
        kept = sum(self.of[b.keep, b.offloaded].away for b in blocks) * facts.local_ranks
        parts = {"frozen base": frozen, "embedding": embedding, "kept for backward": kept}
        if facts.exchange_by_host:
            parts["exchange"] = EXCHANGES * (facts.ranks - 1) * FLOAT * facts.largest_adapters
        return parts

    def host_bytes(self, candidate: Candidate) -> int:
        return sum(self.host_parts(candidate).values())

    def _resident(self, candidate: Candidate) -> int:
        return PLACEMENT_COSTS[candidate.placement].resident_bytes(self.facts, candidate)

    def _head_here(self, candidate: Candidate) -> int:
        return PLACEMENT_COSTS[candidate.placement].resident_head_bytes(self.facts, candidate)

    def _moving(self, candidate: Candidate) -> int:
        return PLACEMENT_COSTS[candidate.placement].moving_bytes(self.facts, candidate)

    def _head_gathered(self, candidate: Candidate) -> int:
        return PLACEMENT_COSTS[candidate.placement].gathered_head_bytes(self.facts)

    def _unreduced(self) -> int:
        facts = self.facts
        return FLOAT * facts.all_adapters if facts.no_sync and facts.accumulation > 1 else 0

    def _peak(self, blocks: Sequence[BlockPlan], head_gathered: int) -> tuple[int, int, int]:
        """(bytes kept, of working tensors, of gradients) at the worst moment of a micro-batch and the update after it.

        Of blocks alike it is the last that has most kept before it, or the first that has most gradients behind it."""
        sizes = [self.of[b.keep, b.offloaded] for b in blocks]
        before = list(accumulate((s.kept for s in sizes), initial=0))
        restored = max(s.away for s in sizes)
        every = len(sizes) * self.gradient
        first_away = next((i for i, s in enumerate(sizes) if s.away), len(sizes))
        behind = [every - (i + 1) * self.gradient for i in range(len(sizes))]
        worst = max(
            (before[-1], self.head.arena + head_gathered + restored, behind[-1]), (0, 0, every + self.unfolded), key=sum
        )
        last = {id(size): i for i, size in enumerate(sizes)}
        first = {id(size): len(sizes) - 1 - i for i, size in enumerate(reversed(sizes))}
        for i in {*last.values(), *first.values()}:
            size = sizes[i]
            going = restored if i > first_away else 0  # what was offloaded last is let go when the next is offloaded
            forward = (before[i], size.forward_bytes + going, behind[-1])
            flying = min(IN_FLIGHT, len(sizes) - 1 - i) * self.reduction
            backward = (before[i + 1], size.backward_bytes + size.away + restored, behind[i] + flying)
            worst = max(worst, forward, backward, key=sum)
        return worst


def _factors(facts: Facts) -> int:
    """Bytes of what magnitudes come to, a number for each output (`fused.Linears`)."""
    outputs = facts.qkv + 2 * facts.hidden + 2 * facts.inner
    return FLOAT * outputs * facts.layers if ADAPTERS[facts.adapter].reads_norms else 0


def _reduction(facts: Facts) -> int:
    """Bytes of the largest block's gradients on their way; this rank's slice of the sum counts as its gradient where it
    becomes that."""
    whole = facts.largest_adapters * facts.sent_bytes
    becomes = facts.reduce_bytes == FLOAT and facts.accumulation == 1
    return whole if becomes else whole + facts.largest_adapters * facts.reduce_bytes // facts.ranks


def _scratch(facts: Facts) -> int:
    """Bytes of `fused.Scratch`: the weights of one input together, adapters beside and below them; unfused, the largest
    linear decoded."""
    f = facts
    if not f.fused:
        q = f.qkv if f.qkv_linears == 1 else f.queries
        return max(q, f.inner * (3 - f.gate_up_linears)) * f.hidden * f.compute_bytes
    qkv, o, gate_up, down = (beside(rank) for rank in (f.rank_qkv, f.rank_o, f.rank_gate_up, f.rank_down))
    laid = (
        (f.qkv + qkv) * pitch(f.hidden + qkv),
        (f.hidden + o) * pitch(f.queries + o),
        (2 * f.inner + gate_up) * pitch(f.hidden + gate_up),
        (f.hidden + down) * pitch(f.inner + down),
    )
    return max(laid) * f.compute_bytes
