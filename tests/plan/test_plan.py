"""The plan: it fits, it is the fastest of its kind, and where nothing fits it says truly what would."""

import json
import re
import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from fsdp_qlora.errors import UserError
from fsdp_qlora.plan import mixes
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.infeasible import CONTEXT_STEP, RANK_STEP, Nearest, nearest, with_context, with_rank
from fsdp_qlora.plan.inputs import KEEP, Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.mixes import Cost, blend, corners, edges
from fsdp_qlora.plan.plan import BlockPlan, Budget, Plan, Wishes, _best, make_plan, plan_record, table
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.search import spread
from fsdp_qlora.units import GIB
from tests.support.known_runs import H200, facts
from tests.support.tiers import some_slow

CARD, HOME = 24 * GIB, Budget(24 * GIB, 64 * GIB)
RIG = facts("llama2_70b", 2, 512, 64, ranks=2)


def plan(known: Facts, wishes: Wishes | None = None, budget: Budget = HOME, rates: Rates | None = H200) -> Plan:
    return make_plan(known, rates, wishes or Wishes(), budget)


def test_70b_on_two_24_gib_cards_streams_with_some_blocks_resident() -> None:
    made = plan(RIG)
    resident = sum(b.resident for b in made.blocks)
    assert made.placement == "stream"
    assert 0 < resident < 80
    assert made.seconds is not None
    assert RIG.step_tokens / made.seconds > 1900
    assert made.seconds < 0.7 * plan(RIG, Wishes(placements=("shard_offload",))).seconds


def test_8b_on_a_24_gib_card_replicates() -> None:
    made = plan(facts("llama3_8b", 1, 1024, 16))
    assert made.placement == "replicate"
    assert all(b.resident for b in made.blocks)
    assert made.staging == 0


def test_8b_with_a_long_context_keeps_in_host_memory_what_the_card_cannot() -> None:
    known = facts("llama3_8b", 1, 65536, 32)
    made = plan(known)
    assert any(b.offloaded for b in made.blocks)
    with pytest.raises(UserError, match="does not fit"):
        plan(known, Wishes(offload=False, placements=("replicate",)))


@pytest.mark.parametrize(("gather", "best"), [(12e9, "stream"), (200e9, "shard")])
def test_shards_where_cards_reach_each_other_faster_than_the_host(gather: float, best: str) -> None:
    known, roomy = facts("llama2_70b", 1, 512, 16, ranks=2), Budget(32 * GIB, 64 * GIB)
    pcie4 = replace(H200, h2d=25e9, h2d_both=18e9, d2h_both=18e9, gather=gather, reduce=gather)
    assert plan(known, Wishes(placements=("shard", "stream")), roomy, pcie4).placement == best


@pytest.mark.parametrize("known", [RIG, facts("llama3_8b", 4, 2048, 16), facts("llama3_70b", 1, 8192, 64, ranks=2)])
@pytest.mark.parametrize("gib", some_slow([14, 20, 24, 48, 80], 3))
def test_a_plan_never_exceeds_its_budget(known: Facts, gib: int) -> None:
    budget = Budget(gib * GIB, 60 * GIB)
    try:
        made = plan(known, budget=budget)
    except UserError:
        return
    memory = Memory(known)
    assert Memory(known).reserved(made.placement, made.device_bytes) <= budget.device_bytes
    assert made.host_bytes <= budget.host_bytes
    assert made.device_bytes == memory.device_bytes(made.candidate) == sum(made.parts.values())
    assert made.host_bytes == memory.host_bytes(made.candidate)
    assert made.seconds == Clock(known, H200).seconds(made.candidate)


@pytest.mark.slow
def test_more_memory_is_never_slower() -> None:
    """But for the hundredth that frugality may cost."""
    seconds = [plan(RIG, budget=Budget(gib * GIB, 64 * GIB)).seconds or 0 for gib in (13, 16, 20, 24, 32, 48, 80)]
    assert all(later <= earlier * 1.01 for earlier, later in pairwise(seconds))
    assert seconds[-1] < 0.8 * seconds[0]
    host = [plan(RIG, budget=Budget(CARD, gib * GIB)).seconds or 0 for gib in (24, 32, 40, 64, 128)]
    assert all(later <= earlier * 1.01 for earlier, later in pairwise(host))


def test_wishes_are_kept() -> None:
    made = plan(RIG, Wishes(placements=("stream",), resident_blocks=7, keep="halves", offload=True))
    assert (made.placement, sum(b.resident for b in made.blocks)) == ("stream", 7)
    assert {(b.keep, b.offloaded) for b in made.blocks} == {("halves", True)}
    made = plan(facts("llama3_8b", 1, 512, 16), Wishes(placements=("stream",)))
    assert made.placement == "stream"
    assert not all(b.resident for b in made.blocks)
    assert plan(facts("llama3_8b", 1, 512, 16), Wishes(resident_blocks=32)).placement == "replicate"
    assert plan(facts("llama3_8b", 1, 512, 16), Wishes(placements=("shard",))).placement == "replicate"


def test_an_unfused_model_plans_only_where_its_blocks_are() -> None:
    made = plan(replace(facts("llama2_70b", 1, 512, 16, ranks=2), fused=False))
    assert {(b.keep, b.offloaded) for b in made.blocks} == {("input", False)}
    assert made.placement == "stream"


@pytest.mark.parametrize(("count", "places"), [(0, 80), (1, 80), (31, 80), (40, 80), (79, 80), (80, 80), (2, 3)])
def test_spread_is_even(count: int, places: int) -> None:
    there = spread(count, places)
    assert sum(there) == count
    for width in (places // 2, places // 4):
        in_window = [sum(there[i : i + width]) for i in range(places - width + 1)]
        assert max(in_window) - min(in_window) <= 1


def test_a_plan_is_the_same_each_time_and_quick_to_find() -> None:
    start = time.process_time()
    first = plan(RIG)
    assert time.process_time() - start < 2
    assert first == plan(replace(RIG))
    assert json.loads(json.dumps(plan_record(first, RIG, H200)))["plan"]["blocks"][0] == asdict(first.blocks[0])


def test_without_rates_what_needs_no_machine_to_be_known() -> None:
    small = Budget(GIB, GIB)
    assert plan(facts("llama3_8b", 1, 512, 16), budget=small, rates=None).placement == "replicate"
    made = plan(RIG, budget=small, rates=None)
    assert (made.placement, made.seconds) == ("shard", None)
    assert set(made.blocks) == {BlockPlan(False, "input", False)}
    made = plan(RIG, Wishes(placements=("stream",), resident_blocks=40, keep="qkv"), small, None)
    assert (made.placement, sum(b.resident for b in made.blocks), made.staging) == ("stream", 40, 3)
    assert {b.keep for b in made.blocks} == {"qkv"}
    assert table(made, RIG, None, small)


# ---- where nothing fits

TOO_LARGE = [
    (facts("llama2_70b", 2, 2048, 64, ranks=2), Budget(10 * GIB, 64 * GIB), Wishes()),
    (facts("llama2_70b", 1, 65536, 64, ranks=2), Budget(24 * GIB, 64 * GIB), Wishes()),
    (facts("llama2_70b", 2, 2048, 64, ranks=2), Budget(24 * GIB, 16 * GIB), Wishes()),
    (facts("llama3_8b", 16, 4096, 16), Budget(12 * GIB, 8 * GIB), Wishes(placements=("replicate",))),
]


def fits(known: Facts, wishes: Wishes, budget: Budget) -> bool:
    try:
        plan(known, wishes, budget)
    except UserError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("known", "budget", "wishes"), TOO_LARGE)
def test_the_nearest_thing_fits_and_one_step_beyond_does_not(known: Facts, budget: Budget, wishes: Wishes) -> None:
    close = nearest(known, wishes, budget)
    assert close != Nearest(None, None, None, None, None)
    cases = [
        (close.context, CONTEXT_STEP, lambda n: fits(with_context(known, n), wishes, budget)),
        (close.batch, 1, lambda n: fits(replace(known, batch=n), wishes, budget)),
        (close.rank, RANK_STEP, lambda n: fits(with_rank(known, n), wishes, budget)),
        (close.device, -(64 << 20), lambda n: fits(known, wishes, replace(budget, device_bytes=n))),
        (close.host, -(64 << 20), lambda n: fits(known, wishes, replace(budget, host_bytes=n))),
    ]
    for value, step, works in cases:
        if value is not None:
            assert works(value)
            assert not works(value + step)


@pytest.mark.slow
@pytest.mark.parametrize(("known", "budget", "wishes"), TOO_LARGE)
def test_a_refusal_is_one_line_with_what_is_needed_and_what_would_fit(
    known: Facts, budget: Budget, wishes: Wishes
) -> None:
    with pytest.raises(UserError) as refused:
        plan(known, wishes, budget)
    line = str(refused.value)
    assert "\n" not in line
    assert f"{budget.device_bytes / GIB:.1f} GiB" in line
    close = nearest(known, wishes, budget)
    for option, value in {"context_length": close.context, "batch_size": close.batch, "lora_rank": close.rank}.items():
        assert (f"--{option} {value}" in line) == (value is not None)
    told = [float(gib) * GIB for gib in re.findall(r"at least ([0-9.]+) GiB", line)]
    needed = [n for n in (close.device, close.host) if n is not None]
    assert all(n <= said < n + GIB / 9 for said, n in zip(told, needed, strict=True))


FREE = ("replicate", "shard", "stream")  # as the options have it where nothing is fixed
LEFT = "leaving sharding_strategy, use_cpu_offload, resident_blocks, keep_activations and use_activation_cpu_offload"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wishes", "gib"),
    [
        (Wishes(placements=("shard",)), 16),
        (Wishes(placements=("replicate",)), 16),
        (Wishes(placements=("stream",), resident_blocks=60), 24),
        (Wishes(placements=FREE, keep="all", offload=False), 16),
    ],
)
def test_a_refusal_of_what_the_user_fixed_names_the_free_plan_first(wishes: Wishes, gib: int) -> None:
    budget = Budget(gib * GIB, 64 * GIB)
    assert fits(RIG, Wishes(placements=FREE), budget)
    with pytest.raises(UserError, match=f"; what would fit: {LEFT} to the plan"):
        plan(RIG, wishes, budget)
    with pytest.raises(UserError, match=f"; what would fit: use_gradient_checkpointing true and {LEFT} to the plan"):
        plan(replace(RIG, remat=False), wishes, budget)
    with pytest.raises(UserError, match=f"; what would fit: {LEFT} to the plan"):
        plan(replace(RIG, reshard=False), wishes, budget)


@pytest.mark.slow
@pytest.mark.parametrize("wishes", [Wishes(), Wishes(placements=FREE), Wishes(placements=("shard",))])
def test_a_refusal_names_the_free_plan_only_where_that_fits_and_another_was_asked_for(wishes: Wishes) -> None:
    with pytest.raises(UserError) as refused:
        plan(RIG, wishes, Budget(4 * GIB, 64 * GIB))
    assert "to the plan" not in str(refused.value)
    alone = facts("llama2_70b", 2, 512, 64)
    with pytest.raises(UserError) as refused:
        plan(alone, Wishes(placements=("replicate", "stream")), Budget(4 * GIB, 64 * GIB))
    assert "to the plan" not in str(refused.value)


def test_a_plan_without_a_gpu_has_a_table_without_a_limit() -> None:
    known, endless = facts("llama3_8b", 1, 512, 16), Budget(float("inf"), GIB)  # type: ignore[arg-type]
    lines = table(plan(known, budget=endless, rates=None), known, None, endless)
    assert "inf" not in "\n".join(lines)
    assert "GiB for each rank" in lines[2]
    several = replace(known, ranks=2, local_ranks=2, shards=2)
    lines += table(plan(several, budget=endless, rates=None), several, None, endless)
    assert "on every rank" in lines[0]
    assert "each rank has its share" in lines[3]
    assert "GPU" not in "\n".join(lines)


def test_the_memory_of_a_tiny_model_is_told_in_mib() -> None:
    tiny = replace(
        facts("llama3_8b", 1, 64, 8),
        hidden=64,
        intermediate=144,
        layers=3,
        heads=4,
        head_dim=16,
        vocabulary=264,
        block_bytes=1 << 17,
        embedding_bytes=1 << 16,
        head_bytes=1 << 16,
        linear_numbers=1 << 15,
        adapter_parameters=1 << 12,
        largest_adapters=1 << 12,
        workspace_bytes=0,
    )
    for budget, rates in ((Budget(float("inf"), GIB), None), (HOME, H200)):  # type: ignore[arg-type]
        made = plan(tiny, budget=budget, rates=rates)
        (line,) = (line for line in table(made, tiny, rates, budget) if line.startswith("memory"))
        assert f"{made.device_bytes / 2**20:.2f} MiB" in line
        told = [float(mib) for mib in re.findall(r"([0-9.]+) MiB", line.split(": ")[1])]
        assert sum(told) == pytest.approx(made.device_bytes / 2**20, rel=0.05)


@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize(("remat", "kept"), [(True, "its input"), (False, "everything")])
def test_the_table_says_what_generic_blocks_keep(remat: bool, kept: str, gpus: bool) -> None:
    known = replace(facts("llama3_8b", 1, 512, 16), fused=False, remat=remat)
    budget, rates = (Budget(80 * GIB, 64 * GIB), H200) if gpus else (Budget(float("inf"), GIB), None)  # type: ignore[arg-type]
    made = plan(known, Wishes(keep=None if remat else "all"), budget, rates)
    assert table(made, known, rates, budget)[1] == f"          every block keeps for backward: {kept}"


def test_as_many_resident_blocks_as_there_are_is_told_as_what_it_is() -> None:
    known = facts("llama3_8b", 1, 512, 16)
    made = plan(known, Wishes(placements=("stream",), resident_blocks=40))
    assert table(made, known, H200, HOME)[0].endswith("every block resident")


def test_the_table_says_what_goes_where_and_what_else_there_is() -> None:
    made = plan(RIG)
    lines = table(made, RIG, H200, HOME)
    text = "\n".join(lines)
    counts = Counter((b.keep, b.offloaded) for b in made.blocks)
    assert f"{sum(b.resident for b in made.blocks)} of 80 blocks resident" in text
    assert len(counts) > 1
    assert all(f"{count} block{'s' * (count > 1)} {keep}" in text for (keep, _), count in counts.items())
    assert f"{made.device_bytes / GIB:.1f} GiB on each GPU" in text
    assert f"{made.seconds:.3f} s a step" in text
    assert "replicate does not fit" in text
    assert "shard_offload" in text


# ---- three kinds of block


KINDS = [(keep, away) for away in (False, True) for keep in KEEP]


def test_blocks_of_several_kinds_are_spread_evenly() -> None:
    counts = Counter({("halves", False): 51, ("halves", True): 20, ("all", False): 9})
    blocks = blend(counts, KINDS)
    assert Counter(blocks) == counts
    for kind, count in counts.items():
        for end in range(1, 81):
            seen = blocks[:end].count(kind)
            assert abs(seen - end * count / 80) < 1.5, (kind, end)


def test_corners_use_up_both_memories_and_no_more() -> None:
    costs = {("input", False): Cost(9.0, 10, 0), ("input", True): Cost(9.0, 1, 9), ("all", False): Cost(5.0, 100, 0)}
    found = corners(costs, 80, 1000, 100)
    assert len(found) == 1
    (counts,) = found
    assert sum(counts.values()) == 80
    assert 1000 - 110 < sum(costs[k].gpu * n for k, n in counts.items()) <= 1000
    assert 100 - 10 < sum(costs[k].host * n for k, n in counts.items()) <= 100
    assert corners(costs, 80, 100, 0) == []


def test_edges_use_up_one_memory_and_leave_room_in_the_other() -> None:
    costs = {("input", False): Cost(9.0, 10, 0), ("input", True): Cost(9.0, 1, 9), ("all", False): Cost(5.0, 100, 0)}
    plenty = 10**9
    by_gpu = [{("input", True): 71, ("all", False): 9}, {("input", False): 78, ("all", False): 2}]  # 971 and 980
    assert [dict(counts) for counts in edges(costs, 80, 1000, plenty)] == by_gpu
    by_host = [{("input", True): 11, ("all", False): 69}, {("input", False): 69, ("input", True): 11}]  # 99 and 99
    assert [dict(counts) for counts in edges(costs, 80, plenty, 100)] == by_host
    assert edges(costs, 80, plenty, plenty) == []


def test_a_little_host_memory_is_worth_a_third_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixes, "MOVES", mixes.MOVES[:-1])  # without the last, which fills gaps with further kinds
    known = facts("llama2_70b", 2, 2048, 64, ranks=2)
    seconds = []
    _best.cache_clear()
    for host in (33.5, 38.4):
        plan = make_plan(known, H200, Wishes(placements=("stream",)), Budget(24 * GIB, int(host * GIB)))
        assert plan.host_bytes <= host * GIB
        seconds.append(plan.seconds)
    assert seconds[1] < seconds[0] * 0.998
    assert len({(b.keep, b.offloaded) for b in plan.blocks}) == 3

    monkeypatch.undo()
    _best.cache_clear()
    filled = make_plan(known, H200, Wishes(placements=("stream",)), Budget(24 * GIB, int(38.4 * GIB)))
    assert 3 < len({(b.keep, b.offloaded) for b in filled.blocks}) <= 5
    assert filled.seconds < seconds[1]
