"""The plan that a run goes on with after its GPU memory has run out: all that is loaded stays, less is kept."""

from dataclasses import replace

import pytest
import torch

from fsdp_qlora.config.parse import parse
from fsdp_qlora.distributed.world import open_world
from fsdp_qlora.errors import TrainingStopped, is_out_of_memory
from fsdp_qlora.plan import planning
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import KEEP, Facts
from fsdp_qlora.plan.plan import BlockPlan, Budget, Plan, Wishes, make_plan, plan_record, refit_plan
from fsdp_qlora.plan.planning import Planned, refit_run
from fsdp_qlora.plan.refit import LoadedMemory, least_given
from fsdp_qlora.plan.search import spread
from fsdp_qlora.units import GIB
from tests.support.known_runs import H200, facts

KNOWN = [
    (facts("llama2_70b", 2, 2048, 64, ranks=2), Budget(24 * GIB, 38 * GIB)),
    (facts("llama2_70b", 2, 2048, 64, ranks=2), Budget(24 * GIB, 92 * GIB)),
    (facts("llama2_70b", 2, 512, 64, ranks=2), Budget(24 * GIB, 38 * GIB)),  # most of which is resident blocks
    (facts("llama3_8b", 1, 16384, 16), Budget(24 * GIB, 60 * GIB)),
    (facts("llama3_8b", 4, 2048, 16), Budget(8 * GIB, 30 * GIB)),
]


def taken(known: Facts, plan: Plan) -> int:
    """Bytes of a GPU at the peak of a step."""
    return LoadedMemory(known).device_bytes(plan.candidate)


def kept(plan: Plan) -> list[tuple[str, bool]]:
    return [(block.keep, block.offloaded) for block in plan.blocks]


@pytest.mark.parametrize(("known", "budget"), KNOWN)
def test_it_takes_less_of_a_gpu_and_brings_nothing_there(known: Facts, budget: Budget) -> None:
    plan = make_plan(known, H200, Wishes(), budget)
    for _ in range(3):
        again = refit_plan(plan, known, H200, Wishes(), budget)
        assert again is not None
        assert again.device_bytes == taken(known, again) <= taken(known, plan) - least_given(taken(known, plan))
        assert again.host_bytes <= budget.host_bytes
        assert kept(again) != kept(plan)
        assert all(before.resident or not now.resident for now, before in zip(again.blocks, plan.blocks, strict=True))
        assert plan.head_resident or not again.head_resident
        assert again.placement == plan.placement
        assert again.staging <= plan.staging
        assert plan_record(again, known, H200)["plan"]["seconds"] == Clock(known, H200).seconds(again.candidate)
        plan = again


@pytest.mark.parametrize(("known", "budget"), KNOWN)
def test_it_is_within_what_another_program_has_left(known: Facts, budget: Budget) -> None:
    plan = make_plan(known, H200, Wishes(), budget)
    less = replace(budget, device_bytes=budget.device_bytes - (GIB if budget.device_bytes > 10 * GIB else GIB // 2))
    again = refit_plan(plan, known, H200, Wishes(), less)
    assert again is not None
    assert LoadedMemory(known).reserved(again.placement, again.device_bytes) <= less.device_bytes


@pytest.mark.parametrize(("known", "budget"), KNOWN)
def test_nothing_alike_that_fits_is_faster(known: Facts, budget: Budget) -> None:
    """Against every mix of two kinds of block, spread evenly."""
    plan = make_plan(known, H200, Wishes(), budget)
    again = refit_plan(plan, known, H200, Wishes(), budget)
    assert again is not None
    assert again.seconds is not None
    memory, clock, limit = LoadedMemory(known), Clock(known, H200), taken(known, plan) - least_given(taken(known, plan))
    kinds = [(keep, away) for keep in KEEP for away in (False, True)]
    for first in kinds:
        for second in kinds:
            for count in range(0, known.layers + 1, 4):
                pattern = spread(count, known.layers)
                blocks = tuple(
                    BlockPlan(block.resident, *(second if other else first))
                    for block, other in zip(plan.blocks, pattern, strict=True)
                )
                candidate = replace(plan.candidate, blocks=blocks)
                if memory.device_bytes(candidate) <= limit and memory.host_bytes(candidate) <= budget.host_bytes:
                    assert clock.seconds(candidate) >= again.seconds * (1 - 1e-3), (first, second, count)


def test_only_what_the_user_left_open_is_given() -> None:
    known, budget = KNOWN[0]
    plan = make_plan(known, H200, Wishes(keep="qkv", offload=False), Budget(80 * GIB, 64 * GIB))
    assert refit_plan(plan, known, H200, Wishes(keep="qkv", offload=False), budget) is None
    offloading = refit_plan(plan, known, H200, Wishes(keep="qkv"), Budget(80 * GIB, 200 * GIB))
    assert offloading is not None
    assert {keep for keep, _ in kept(offloading)} == {"qkv"}
    assert any(away for _, away in kept(offloading))
    wishes = Wishes(placements=("stream",), resident_blocks=20)
    resident = make_plan(known, H200, wishes, budget)
    fewer = refit_plan(resident, known, H200, wishes, budget)
    assert fewer is not None
    assert [block.resident for block in fewer.blocks] == [block.resident for block in resident.blocks]
    lower = refit_plan(plan, known, H200, Wishes(offload=False), Budget(80 * GIB, 64 * GIB))
    assert lower is not None
    assert not any(away for _, away in kept(lower))


def test_the_leanest_is_taken_where_none_is_within_what_is_left_and_then_nothing() -> None:
    known, budget = KNOWN[3]
    plan = make_plan(known, H200, Wishes(), budget)
    nothing_left = replace(budget, device_bytes=GIB)
    again = refit_plan(plan, known, H200, Wishes(), nothing_left)
    assert again is not None
    assert again.device_bytes < taken(known, plan)
    assert refit_plan(again, known, H200, Wishes(), nothing_left) is None
    generic = replace(known, fused=False)
    assert refit_plan(make_plan(generic, H200, Wishes(), budget), generic, H200, Wishes(), budget) is None


def test_without_rates_every_block_keeps_one_level_less() -> None:
    known, budget = KNOWN[4]
    plan = make_plan(known, None, Wishes(keep="qkv", offload=True), budget)
    seen = []
    while (again := refit_plan(plan, known, None, Wishes(offload=True), budget)) is not None:
        seen.append(set(kept(again)))
        plan = again
    assert seen == [{(keep, True)} for keep in ("attention", "halves", "input")]
    assert (
        refit_plan(make_plan(known, None, Wishes(keep="qkv"), budget), known, None, Wishes(keep="qkv"), budget) is None
    )


def test_ranks_refit_to_the_least_that_any_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    known, budget = KNOWN[1]
    plan = make_plan(known, H200, Wishes(), budget)
    config, told = parse(["--model_name", "m"]), []
    planned = Planned(plan, [], {}, config, known, H200, budget, None)
    with open_world(config.launch, 0) as world:
        monkeypatch.setattr(planning, "device_bytes", lambda *_: 23.5 * GIB)

        def gather(self: object, numbers: list[float]) -> list[list[float]]:
            told.append(numbers)
            return [list(numbers), [22 * GIB, 1e15]]

        monkeypatch.setattr(type(world), "gather", gather)
        again = refit_run(planned, world)
    assert again is not None
    assert LoadedMemory(known).reserved(plan.placement, again.plan.device_bytes) <= 22 * GIB
    assert again.plan.host_bytes <= budget.host_bytes
    assert again.record["plan"]["device_bytes"] == again.plan.device_bytes
    assert told[0][0] == 23.5 * GIB
    assert told[0][1] > plan.host_bytes, "what the plan has of the host's memory is not gone"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("Connection closed by peer"), False),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), False),
        (TrainingStopped("rank 1: GPU memory ran out in step 3 (CUDA out of memory)"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one
