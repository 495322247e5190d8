"""What a plan counts for a step's tensors, beside those that the program itself asks for, and their places."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig

from fsdp_qlora.config.cards import rig_of
from fsdp_qlora.config.parse import parse
from fsdp_qlora.memory.arena_layout import Schedule, most_alive, place
from fsdp_qlora.plan.candidate import BlockPlan, Candidate
from fsdp_qlora.plan.inputs import KEEP, facts_of
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.planning import sending
from fsdp_qlora.plan.rehearsal import rehearse
from fsdp_qlora.rig_plan import build_for, world_of
from tests.support.known_runs import facts

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=False)
GEMMA = Gemma2Config(**SIZES, head_dim=128, query_pre_attn_scalar=128)
SLACK = 1 << 20  # bytes: what is counted of some tiny tensors


@pytest.fixture(autouse=True)
def bare_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing computes with the model's parameters before they are on the meta device: they need not be filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def disjoint(schedule: Schedule) -> bool:
    """Return whether no two tensors that live at the same time share a byte, and all lie inside."""
    there = [
        (life.birth, life.death, start, start + life.nbytes)
        for life, start in zip(schedule.lives, schedule.offsets, strict=True)
        if life.nbytes
    ]
    apart = all(
        other[0] >= one[1] or other[2] >= one[3] or other[3] <= one[2]
        for i, one in enumerate(there)
        for other in there[i + 1 :]
    )
    return apart and all(start >= 0 and end <= schedule.nbytes for _, _, start, end in there)


@pytest.mark.parametrize("hf_config", [LLAMA, GEMMA], ids=["llama", "gemma2"])
@pytest.mark.parametrize(
    ("rig", "options", "kinds"),
    [
        ("8xH100", "--context_length 23 --batch_size 3 --lora_rank 256", [("input", True), ("qkv", True)]),
        ("2x4090", "--context_length 23 --batch_size 3 --lora_rank 256", [("input", False)]),
        ("1xH100", "--context_length 4000 --batch_size 2 --lora_rank 13", [("attention", True)]),
        ("1x4090", "--context_length 512 --batch_size 8 --lora_rank 8", [("all", False)]),
        ("2x4090", "--context_length 300 --batch_size 2 --train_type bnb_dora", None),
    ],
)
def test_no_step_has_more_alive_than_the_plan_counts(
    hf_config: PretrainedConfig, rig: str, options: str, kinds: list[tuple[str, bool]] | None
) -> None:
    config, cards = (
        parse(["--model_name", "m", "--plan_only", "true", "--plan_for", rig, *options.split()]),
        rig_of(rig),
    )
    built, world = build_for(config, cards, hf_config), world_of(cards)
    by_host = cards.count > 1 and not cards.card.peers
    known = facts_of(built.model, config, world, built.fusion, 8, cards.card.capability)
    memory = Memory(sending(replace(known, exchange_by_host=by_host)))
    draw = random.Random(options)
    some = kinds or [(draw.choice(KEEP), draw.random() < 0.5) for _ in range(3)]
    blocks = tuple(BlockPlan(False, *draw.choice(some)) for _ in range(known.layers))
    lives = rehearse(built.model, blocks, config, known.context, world, by_host).lives
    alive, counted = most_alive(lives), memory.arena(Candidate("stream", blocks, True, 3))
    assert alive <= counted + SLACK
    assert counted <= 1.15 * alive + SLACK
    assert disjoint(place(lives))


@pytest.mark.parametrize(("reduce_bytes", "each"), [(4, 4 // 2), (2, 2 + 2 // 2)])
def test_sums_over_micro_batches_are_reduced_beside_the_arena(reduce_bytes: int, each: int) -> None:
    """A rank's part of the sum, and the whole where it is rounded first; three blocks' at once."""
    known = facts("llama3_8b", 1, 512, 16, ranks=2, accumulation=4, no_sync=True)
    memory = Memory(replace(known, reduce_bytes=reduce_bytes, sent_bytes=reduce_bytes))
    blocks = (BlockPlan(True, "input", False),) * known.layers
    candidate = Candidate("replicate", blocks, True, 0)
    loose = max(memory.head.loose, memory.of["input", False].loose)
    beside = memory.step_parts(candidate, 0)["working"] + sum(memory._worst(candidate.kinds, 0)[::2])
    assert beside == loose + 3 * each * known.largest_adapters
