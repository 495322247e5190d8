"""What makes the search fast changes no plan: its sums, its mixes and its walks against the plain ones."""

import random
from collections import Counter
from dataclasses import replace
from itertools import accumulate

import pytest

from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Homes, Kinds
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import KEEP, Facts
from fsdp_qlora.plan.memory import IN_FLIGHT, Memory
from fsdp_qlora.plan.mixes import blend
from fsdp_qlora.plan.placements import PLACEMENT_COSTS
from fsdp_qlora.plan.plan import Budget, Plan, Wishes, _best, make_plan
from fsdp_qlora.plan.search import spread
from fsdp_qlora.plan.simulate import NEVER, Walk
from fsdp_qlora.units import GIB
from tests.support.known_runs import H200, facts

KINDS = [(keep, away) for away in (False, True) for keep in KEEP]
RIG = facts("llama2_70b", 2, 2048, 64, ranks=2)
RUNS = [RIG, replace(RIG, exchange_by_host=True, mean_tokens=3973, mean_row=146), facts("llama3_8b", 4, 1024, 16)]


def some(layers: int, seed: int) -> Kinds:
    draw = random.Random(seed)
    few = draw.sample(KINDS, draw.randint(1, 4))
    return tuple(draw.choice(few) for _ in range(layers))


def plain_blend(counts: Counter[tuple[str, bool]]) -> Kinds:
    layers, given, blocks = sum(counts.values()), Counter[tuple[str, bool]](), []
    for place in range(1, layers + 1):
        behind = max(counts, key=lambda kind: (place * counts[kind] - layers * given[kind], -KINDS.index(kind)))
        given[behind] += 1
        blocks.append(behind)
    most = max(blocks, key=lambda kind: (not kind[1], KEEP.index(kind[0])))
    last = max(place for place, kind in enumerate(blocks) if kind == most)
    return (*blocks[:last], *blocks[last + 1 :], most)


def plain_peak(known: Facts, kinds: Kinds, head_gathered: int) -> int:
    """The largest sum of any moment: every block's forward and backward, the head and the update."""
    memory = Memory(known)
    sizes = [memory.of[kind] for kind in kinds]
    before = list(accumulate((size.kept for size in sizes), initial=0))
    restored, every = max(size.away for size in sizes), len(sizes) * memory.gradient
    first_away = next((i for i, size in enumerate(sizes) if size.away), len(sizes))
    moments = [before[-1] + memory.head.arena + head_gathered + restored, every + memory.unfolded]
    embedded = known.tokens * known.hidden * known.compute_bytes if sizes[0].away else 0
    for i, size in enumerate(sizes):
        moments.append(before[i] + size.forward_bytes + (restored if i > first_away else 0) + (embedded if i else 0))
        flying = min(IN_FLIGHT, len(sizes) - 1 - i) * memory.reduction
        behind = every - (i + 1) * memory.gradient + flying
        moments.append(before[i + 1] + size.backward_bytes + size.away + restored + behind)
        moments.append(before[i] + memory.stream + memory.sending + behind)
    return max(moments) + max(memory.head.loose, *(size.loose for size in sizes))


@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_spread_as_one_by_one(seed: int) -> None:
    draw = random.Random(seed)
    counts = Counter({kind: draw.randint(1, 40) for kind in draw.sample(KINDS, draw.randint(1, 5))})
    assert blend(counts, KINDS) == plain_blend(counts)


@pytest.mark.parametrize("known", RUNS)
@pytest.mark.parametrize("seed", range(4))
def test_the_peak_is_that_of_all_blocks(known: Facts, seed: int) -> None:
    kinds = some(known.layers, seed)
    for placement, cost in PLACEMENT_COSTS.items():
        if known.ranks > 1 or not cost.shards:
            assert Memory(known).peak(placement, kinds) == plain_peak(known, kinds, cost.gathered_head_bytes(known))


@pytest.mark.parametrize("known", RUNS)
def test_numbers_of_blocks_tell_what_a_candidate_takes(known: Facts) -> None:
    memory, kinds, layers = Memory(known), some(known.layers, 5), known.layers
    for resident in (0, layers // 3, layers):
        blocks = tuple(BlockPlan(i >= layers - resident, *kind) for i, kind in enumerate(kinds))
        candidate = Candidate("stream", blocks, False, 3)
        standing = memory.standing("stream", Homes(resident, layers - resident, False, 3))
        peak = memory.peak("stream", kinds)
        step, loading = (sum(parts(candidate).values()) for parts in (memory.step_parts, memory.loading_parts))
        assert standing.device_bytes(peak) == memory.device_bytes(candidate) == max(step, loading)
        assert standing.host + memory.offloaded(kinds) == memory.host_bytes(candidate)


@pytest.mark.parametrize("known", RUNS)
@pytest.mark.parametrize("seed", range(4))
def test_a_walk_is_given_up_only_where_it_takes_longer(known: Facts, seed: int) -> None:
    clock, kinds, layers = Clock(known, replace(H200, h2d=3e9)), some(known.layers, seed), known.layers
    for placement in PLACEMENT_COSTS:
        if known.ranks == 1 and PLACEMENT_COSTS[placement].shards:
            continue
        stays = spread(layers // 3, layers)
        homes = Homes(layers // 3, layers - layers // 3, True, 3)
        seconds = clock.step(placement, kinds, stays, homes)
        assert clock.step(placement, kinds, stays, homes, seconds) == seconds
        for share in (0.2, 0.9, 0.999):
            assert clock.step(placement, kinds, stays, homes, seconds * share) in (seconds, NEVER)
        assert clock.step(placement, kinds, stays, homes, clock.computing(kinds) / 2) == NEVER


@pytest.mark.slow
@pytest.mark.parametrize("known", RUNS[1:])
def test_walks_that_are_given_up_are_no_plans(known: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned() -> Plan:
        _best.cache_clear()
        return make_plan(known, H200, Wishes(), Budget(int(22.3 * GIB), int(38.3 * GIB)))

    fast, walk = planned(), Walk.run
    monkeypatch.setattr(Walk, "run", lambda self, limit: walk(self))
    assert planned() == fast
    _best.cache_clear()
