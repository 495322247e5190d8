"""The plan's memory: equal to what the program's own code allocates on the meta device, near what was measured."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.memory.arena_layout import most_alive, place
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.optim.adapter_group import BLOCKS_PER_UPDATE
from fsdp_qlora.optim.gradient_reduction import IN_FLIGHT
from fsdp_qlora.placement.load import encode
from fsdp_qlora.plan import memory
from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Placed
from fsdp_qlora.plan.costs import BlockCost, block_costs, trace
from fsdp_qlora.plan.inputs import KEEP, Facts, facts_of
from fsdp_qlora.plan.loading import Loading
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.placements import staged_bytes
from fsdp_qlora.plan.rehearsal import rehearse
from fsdp_qlora.plan.shape import META
from fsdp_qlora.units import GIB
from tests.support.known_runs import MEASURED, facts
from tests.support.metered import WORLD, Meter, encode_on_meta, planned
from tests.support.tiers import some_slow

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SMALL: dict[str, Any] = {"batch_size": 4, "context_length": 256, "lora_rank": 20}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "stacked projections": Phi3Config(**SHAPE),
    "head norms": Qwen3Config(**SHAPE, head_dim=64),
    "four norms": Gemma2Config(**SHAPE, head_dim=64, attn_logit_softcapping=None),
}


def every(facts: Facts, keep: str, offloaded: bool = False, placement: Placed = "replicate") -> Candidate:
    return Candidate(placement, (BlockPlan(True, keep, offloaded),) * facts.layers, True, 0)


def of(known: Facts, keep: str, offloaded: bool = False) -> BlockCost:
    return block_costs(known)[keep, offloaded]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora_dropout": 0.1},
        pytest.param({"lora_target_modules": ".*(q_proj|v_proj|qkv_proj)"}, marks=pytest.mark.slow),
        pytest.param({"lora_target_modules": "down_proj"}, marks=pytest.mark.slow),
        pytest.param({"train_type": "bnb_dora"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "dropout", "qkv alone", "down alone", "dora"],
)
def test_a_block_made_of_facts_takes_what_the_models_own_takes(family: str, more: dict[str, Any]) -> None:
    model, config, fusion = planned(FAMILIES[family], **SMALL, **more)
    known = facts_of(model, config, WORLD, fusion, 8)
    own = list(model.blocks.values())[-1].fused  # the first may copy its input
    assert isinstance(own, FusedBlock)
    for backend in ("cudnn", "flash", "flash_attn", "math"):
        for keep in KEEP:
            here, away = trace(replace(own, backend=backend), known.batch, known.context, Keep.named(keep))
            assert of(replace(known, attention=backend), keep) == here, (backend, keep)
            assert of(replace(known, attention=backend), keep, True) == away, (backend, keep)


def test_dora_saves_what_its_magnitudes_gradients_need_and_costs_a_few_percent() -> None:
    """down's output, and o's in place of h2, which is made of it; weights are dequantized once more in a step."""
    lora = facts("llama3_8b", 4, 2048, 16)
    dora = replace(lora, adapter="dora")
    number = lora.tokens * lora.hidden * lora.compute_bytes
    for keep in KEEP:
        least, most = of(lora, keep), of(dora, keep)
        assert most.kept - least.kept == number
        assert of(dora, keep, True).away - of(lora, keep, True).away == most.kept - least.kept
        ours, theirs = most.forward + most.backward, least.forward + least.backward
        assert (ours.forward, ours.backward) == (theirs.forward, theirs.backward), "no product is added"
        assert ours.dequantized == theirs.dequantized
        assert theirs.bytes < ours.bytes < 1.25 * theirs.bytes
        assert most.once.dequantized == pytest.approx(least.forward.dequantized, rel=1e-3)
        assert most.once.forward == most.once.backward == 0
        assert most.once.skinny > 0
        assert least.once.launches == 0


def test_what_a_level_keeps_is_what_its_name_says() -> None:
    """In numbers per token; beside them x A^T, and attention's sums by rows in float32."""
    known = facts("llama3_8b", 4, 2048, 16)
    h, queries, qkv, inner = known.hidden, known.queries, known.qkv, known.intermediate
    numbers = {"input": h, "halves": 2 * h, "attention": 2 * h + queries, "qkv": 2 * h + queries + qkv}
    numbers["all"] = numbers["qkv"] + 2 * inner
    for keep in KEEP:
        least = known.tokens * numbers[keep] * known.compute_bytes
        assert least < of(known, keep).kept < 1.02 * least
        assert of(known, keep, True).away == pytest.approx(least, rel=0.003)


@pytest.mark.parametrize(
    ("ranks", "train_type"), [(1, "qlora"), (2, "qlora"), (4, "qlora"), (2, "bnb_dora")], ids=["1", "2", "4", "2-dora"]
)
@pytest.mark.parametrize("vocabulary", some_slow([1024, 32000], 2))
def test_a_step_needs_as_much_at_once_as_is_counted(ranks: int, train_type: str, vocabulary: int) -> None:
    """With few words the peak is in a block's backward, with many at the head."""
    shape = LlamaConfig(**SHAPE | {"vocab_size": vocabulary, "num_hidden_layers": 6})
    model, config, fusion = planned(shape, **SMALL, train_type=train_type)
    world = replace(WORLD, size=ranks, local_size=ranks)
    known = replace(facts_of(model, config, world, fusion, 8), sent_bytes=2, exchange_by_host=True)
    mixes = {keep: [BlockPlan(True, keep, False)] * 6 for keep in KEEP}
    mixes["mixed"] = [
        BlockPlan(True, keep, away) for keep, away in zip((*KEEP, "all"), [True] * 3 + [False] * 3, strict=True)
    ]
    for name, blocks in mixes.items():
        lives = rehearse(model, blocks, config, known.context, world, widens=True).lives
        counted = Memory(known).arena(Candidate("replicate", tuple(blocks), True, 0))
        assert most_alive(lives) == pytest.approx(counted, rel=0.03), name
        assert place(lives).nbytes <= 1.06 * most_alive(lives), name


def test_encoding_a_block_takes_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, fusion = planned(LlamaConfig(**SHAPE))
    unit = next(u for u in model.units if len(u.sources) > 1)
    entries = unit.frozen.layout.entries
    weights = {source: torch.ones(entries[entry].shape).bfloat16() for entry, source in unit.sources.items()}
    encode_on_meta(monkeypatch)
    for piece in (64 << 20, 1 << 20):  # a weight is one, or several
        monkeypatch.setattr("fsdp_qlora.weights.codecs.pieces.PIECE", piece)
        meter = Meter()
        with meter:
            encode(unit, weights, META)
        scratch = Loading(replace(facts_of(model, config, WORLD, fusion, 8.0), dummy_weights=False)).scratch
        block = unit.frozen.layout.nbytes
        assert block + 0.8 * scratch < meter.peak <= block + scratch


def test_the_plan_has_the_programs_numbers() -> None:
    assert (memory.TOGETHER, memory.IN_FLIGHT) == (BLOCKS_PER_UPDATE, IN_FLIGHT)


@pytest.mark.parametrize("row", MEASURED, ids=[row.name for row in MEASURED])
def test_measured_peaks_are_met_within_5_percent(row: Any) -> None:
    # When these were measured, gradients were there all the time, master copies had four bytes a value, and of gate and
    # up one was decoded at a time.
    known = replace(row.facts, accumulation=2, master_bytes=4)
    memory = Memory(known)
    candidate = every(known, row.keep, row.offloaded, row.placement)
    predicted = memory.device_bytes(candidate) - memory.scratch // 2
    assert predicted == pytest.approx(row.allocated_gib * GIB, rel=0.05)


def test_offloaded_blocks_keep_little_on_the_gpu_and_the_rest_in_host_memory() -> None:
    known = facts("llama3_8b", 4, 2048, 16)
    for keep in KEEP:
        here, away = (of(known, keep, offloaded) for offloaded in (False, True))
        assert away.kept + away.away == here.kept
        assert away.kept < here.kept / 20
    memory = Memory(known)
    assert memory.host_bytes(every(known, "qkv", True)) > memory.host_bytes(every(known, "qkv"))


def test_streamed_blocks_are_in_host_memory_once_and_in_buffers_on_the_gpu() -> None:
    known = facts("llama3_70b", 1, 4096, 16, ranks=2)
    memory = Memory(known)

    def streamed(resident: int, head: bool, staging: int = 3) -> Candidate:
        blocks = tuple(BlockPlan(i < resident, "input", False) for i in range(known.layers))
        return Candidate("stream", blocks, head, staging)

    ten, none = streamed(10, True), streamed(0, True)
    assert memory.device_bytes(ten) - memory.device_bytes(none) == 10 * known.block_bytes
    assert memory.host_bytes(none) - memory.host_bytes(ten) == 10 * known.block_bytes
    # A streamed head makes every buffer as large as it is.
    assert staged_bytes(known, streamed(0, False).homes) == known.head_bytes > known.block_bytes
    assert staged_bytes(known, none.homes) == known.block_bytes
    assert memory.device_bytes(ten) == sum(memory.step_parts(ten).values())
    assert memory.host_bytes(streamed(0, False)) - memory.host_bytes(none) == known.head_bytes


def test_facts_are_plain_numbers_that_survive_json() -> None:
    model, config, fusion = planned(FAMILIES["llama"], context_length=256, lora_rank=16)
    known = facts_of(model, config, WORLD, fusion, 8)
    assert Facts(**json.loads(json.dumps(asdict(known)))) == known
    assert known.adapter_parameters * known.layers == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_facts_of_an_unfused_model() -> None:
    model, config, fusion = planned(FAMILIES["llama"], context_length=256, lora_rank=16, fused="false")
    known = facts_of(model, config, WORLD, fusion, 8)
    assert not known.fused
    assert (known.hidden, known.intermediate, known.heads, known.kv_heads, known.head_dim) == (1024, 3584, 16, 4, 64)
    assert Memory(known).device_bytes(every(known, "input")) > known.layers * known.block_bytes


@pytest.mark.parametrize("fused", ["auto", "false"])
def test_adapters_on_some_layers_only_are_seen_whichever_layer_has_them(fused: str) -> None:
    options = {"context_length": 256, "lora_rank": 16, "fused": fused}
    one, everywhere = (
        facts_of(model, config, WORLD, fusion, 8)
        for model, config, fusion in (
            planned(FAMILIES["llama"], **options, lora_target_modules=modules)
            for modules in ("layers.1.mlp.down_proj", "down_proj")
        )
    )
    assert one.largest_adapters == everywhere.adapter_parameters == everywhere.largest_adapters == 16 * (1024 + 3584)
    assert one.all_adapters == one.largest_adapters, "of two layers one has an adapter"
    ranks = ("lora_rank_qkv", "lora_rank_o", "lora_rank_gate_up", "lora_rank_down")
    assert [getattr(one, name) for name in ranks] == [getattr(everywhere, name) for name in ranks]
    assert of(one, "all") == of(everywhere, "all")
    assert Memory(one).masters * 2 == Memory(everywhere).masters
