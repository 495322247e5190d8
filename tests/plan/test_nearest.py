"""What a refusal names as enough is accepted when it is asked for, by options as a user gives them."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.config.cards import rig_of
from fsdp_qlora.config.parse import parse
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.errors import UserError
from fsdp_qlora.plan.budget import Budget
from fsdp_qlora.plan.infeasible import CONTEXT_STEP, RANK_STEP, nearest, with_batch, with_rank
from fsdp_qlora.plan.inputs import Facts, facts_of
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.plan import BlockPlan, Plan, Wishes, make_plan
from fsdp_qlora.rig_plan import Built, build_for, plan_built, world_of
from fsdp_qlora.units import GIB
from tests.support.known_runs import H200, facts

SHAPE = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=32000,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
RIG = "2x4090"
Options = dict[str, str | int | float]


@pytest.fixture(autouse=True)
def bare_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing computes with the model's parameters before they are on the meta device: they need not be filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@cache
def built(rank: int, train_type: str) -> Built:
    asked = ["--model_name", "m", "--plan_only", "true", "--plan_for", RIG, "--lora_rank", str(rank)]
    return build_for(parse([*asked, "--train_type", train_type]), rig_of(RIG), SHAPE)


def plan_of(options: Options) -> Plan:
    given = {"plan_only": "true", "plan_for": RIG, "lora_rank": 64, "train_type": "qlora"} | options
    config = parse(
        ["--model_name", "m", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    )
    return plan_built(built(config.adapter.lora_rank, config.model.train_type), config, rig_of(RIG)).plan


def named(refusal: str) -> list[Options]:
    """Return the options that a refusal says would be enough, each alone."""
    lower = re.findall(r"--(context_length|batch_size|lora_rank) (\d+)", refusal)
    found: list[Options] = [{name: value} for name, value in lower]
    found += [{"gpu_memory_gib": gib} for gib in re.findall(r"at least ([0-9.]+) GiB on each GPU", refusal)]
    return found + [{"host_memory_gib": gib} for gib in re.findall(r"at least ([0-9.]+) GiB of host", refusal)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"gpu_memory_gib": 2.2, "context_length": 4096, "batch_size": 4}, {"context_length", "gpu_memory_gib"}),
        ({"gpu_memory_gib": 1.8, "lora_rank": 256, "context_length": 64}, {"lora_rank", "gpu_memory_gib"}),
        ({"gpu_memory_gib": 4, "host_memory_gib": 0.05, "context_length": 512}, {"host_memory_gib"}),
        (
            {"gpu_memory_gib": 4, "host_memory_gib": 0.1, "optimizer": "paged_adamw", "use_cpu_offload": "true"},
            {"host_memory_gib"},
        ),
        ({"gpu_memory_gib": 2.1, "eval_samples": 8, "eval_generate": 4, "context_length": 4096}, {"gpu_memory_gib"}),
    ],
)
def test_what_would_fit_is_accepted(options: Options, names: set[str]) -> None:
    with pytest.raises(UserError) as refused:
        plan_of(options)
    said = str(refused.value)
    assert f"{options['gpu_memory_gib']:.1f} GiB of each GPU, " in said
    assert names <= {name for one in named(said) for name in one}
    for one in named(said):
        assert plan_of(options | one).seconds


def test_the_pages_of_an_optimizer_are_host_memory_of_the_plan() -> None:
    plain, paged = (plan_of({"optimizer": name, "use_cpu_offload": "true"}) for name in ("adamw", "paged_adamw"))
    assert plain.blocks == paged.blocks
    adapters = 3 * 64 * (2 * (2048 + 256) + 2 * (2048 + 2048) + 3 * (2048 + 5632))
    assert paged.host_bytes - plain.host_bytes == 8 * adapters


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_adapters_of_a_lower_rank_are_counted_as_the_model_has_them(adapter: str) -> None:
    """Magnitudes stay as many, whatever the rank."""
    train_type = {"lora": "qlora", "dora": "bnb_dora"}[adapter]
    assert ADAPTERS[adapter].reads_norms == (adapter == "dora")
    known, lower = (of(built(rank, train_type), rank, train_type) for rank in (64, RANK_STEP))
    assert with_rank(known, RANK_STEP) == lower


def of(model: Built, rank: int, train_type: str, lengths: RowLengths | None = None, batch: int = 1) -> Facts:
    asked = ["--model_name", "m", "--lora_rank", str(rank), "--train_type", train_type, "--batch_size", str(batch)]
    config, rig = parse([*asked, "--context_length", "4096"]), rig_of(RIG)
    return facts_of(model.model, config, world_of(rig), model.fusion, 8, rig.card.capability, lengths=lengths)


@pytest.mark.parametrize("longest", [4096, 1000, 120])
def test_fewer_rows_of_many_lengths_may_be_the_longest(longest: int) -> None:
    lengths = RowLengths(np.array([longest, *range(50, 100)], dtype=np.int64), -(-longest // 8) * 8, 1.0)
    model = built(64, "qlora")
    known = of(model, 64, "qlora", lengths, 16)
    for batch in (1, 2, 8, 15):
        there = of(model, 64, "qlora", lengths, batch)
        guessed = with_batch(known, batch)
        assert there.tokens <= guessed.tokens <= known.tokens + CONTEXT_STEP * batch


@pytest.mark.slow
def test_a_layout_that_takes_more_than_its_sum_is_told_as_what_is_needed() -> None:
    """The GPU that a refusal asks for is larger than the one there is, and holds the layout."""
    known, beyond = facts("llama3_8b", 8, 2048, 16), 300 << 20
    memory, wishes = Memory(known), Wishes(placements=("replicate",))
    like = make_plan(known, H200, wishes, Budget(80 * GIB, 64 * GIB)).candidate

    def plan(device: int) -> Plan:
        def arena(blocks: tuple[BlockPlan, ...]) -> int:
            return memory.arena(replace(like, blocks=blocks)) + beyond

        return make_plan(known, H200, wishes, Budget(device, 64 * GIB), arena)

    least = nearest(known, wishes, Budget(GIB, 64 * GIB)).device
    assert least is not None
    with pytest.raises(UserError) as refused:
        plan(least + (16 << 20))
    (said,) = re.findall(r"at least ([0-9.]+) GiB on each GPU", str(refused.value))
    assert f"into the {least / GIB:.1f} GiB of each GPU" in str(refused.value)
    assert float(said) * GIB > least + beyond
    assert plan(int(float(said) * GIB)).seconds


def test_the_last_streamed_blocks_take_no_more_buffers_than_there_are_blocks() -> None:
    """Where host memory has room for one block, all others stay, though three staging buffers would not fit beside."""
    known = facts("llama2_70b", 1, 512, 8, layers=6)
    host = known.embedding_bytes + int(1.5 * known.block_bytes)
    wishes = Wishes(placements=("stream",), keep="input", offload=False)
    least = nearest(known, wishes, Budget(GIB, host)).device
    assert least is not None
    plan = make_plan(known, H200, wishes, Budget(least, host))
    assert sum(block.resident for block in plan.blocks) == 5
