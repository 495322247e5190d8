"""The plan's memory: equal to what the program's own code allocates on the meta device, near what was measured."""

import copy
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config

from fsdp_qlora import shards
from fsdp_qlora.codecs import NF4, Parts
from fsdp_qlora.fused import FusedBlock
from fsdp_qlora.kernels import cross_entropy, glu_lora
from fsdp_qlora.loading import encode
from fsdp_qlora.offload import ActivationOffload
from fsdp_qlora.plan import memory, moments
from fsdp_qlora.plan.facts import Facts, facts_of
from fsdp_qlora.plan.memory import BlockPlan, Candidate, Memory, Placed
from fsdp_qlora.plan.moments import KEEP, BlockBytes
from fsdp_qlora.units import GIB
from tests.known_runs import MEASURED, facts
from tests.metered import META, WORLD, Meter, metered_block, metered_step, planned

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
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "stacked projections": Phi3Config(**SHAPE),
    "head norms": Qwen3Config(**SHAPE, head_dim=64),
    "four norms": Gemma2Config(**SHAPE, head_dim=64, attn_logit_softcapping=None),
}


def every(facts: Facts, keep: str, offloaded: bool = False, placement: Placed = "replicate") -> Candidate:
    return Candidate(placement, (BlockPlan(True, keep, offloaded),) * facts.layers, True, 0)


@pytest.fixture
def without_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's own, which is not made on meta."""
    monkeypatch.setattr(moments, "_attention", lambda facts: (0, 0))


@pytest.mark.usefixtures("without_workspace")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_block_allocates_what_is_counted(family: str, dropout: float) -> None:
    model, config, fusion = planned(
        FAMILIES[family], batch_size=4, context_length=256, lora_rank=20, lora_dropout=dropout
    )
    known = facts_of(model, config, WORLD, fusion, 8)
    for keep in KEEP:
        counted, real = BlockBytes.of(known, keep, False), metered_block(model, config, keep)
        assert counted.kept == real.kept, keep
        assert counted.forward == real.forward, keep
        assert counted.backward == real.backward, keep


@pytest.mark.usefixtures("without_workspace")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_with_a_narrow_mlp_allocates_what_is_counted(family: str) -> None:
    """Its peak is in attention's half."""
    for inner in (512, 1024):
        narrow = copy.deepcopy(FAMILIES[family])
        narrow.intermediate_size = inner
        model, config, fusion = planned(narrow, batch_size=4, context_length=256, lora_rank=20)
        known = facts_of(model, config, WORLD, fusion, 8)
        for keep in KEEP:
            counted, real = BlockBytes.of(known, keep, False), metered_block(model, config, keep)
            assert counted.backward == real.backward, (inner, keep)


class _FlashAttn(torch.autograd.Function):
    """What the flash-attn package's function allocates and saves."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out, sums = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@pytest.mark.usefixtures("without_workspace")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_with_flash_attn_allocates_what_is_counted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics hold q, k and v, so that no level keeps them, and level `input` holds normalised heads twice."""
    package = SimpleNamespace(flash_attn_func=lambda q, k, v, **_: _FlashAttn.apply(q, k, v))
    monkeypatch.setitem(sys.modules, "flash_attn", package)  # type: ignore[arg-type]
    model, config, fusion = planned(FAMILIES[family], batch_size=4, context_length=256, lora_rank=20)
    for block in model.blocks.values():
        assert isinstance(block.fused, FusedBlock)
        block.fused = replace(block.fused, backend="flash_attn")
    known = facts_of(model, config, WORLD, replace(fusion, attention=("flash_attn",)), 8)
    for keep in KEEP:
        counted, real = BlockBytes.of(known, keep, False), metered_block(model, config, keep)
        assert counted.kept == real.kept, keep
        assert counted.forward == real.forward, keep
        assert counted.backward == real.backward, keep


@pytest.mark.parametrize("rank", [16, 32])
def test_a_block_that_is_parked_allocates_what_is_counted(rank: int) -> None:
    """At rank 16 the rows of gate and up have a pitch, and a copy without is made; at rank 32 they are contiguous."""
    model, config, fusion = planned(FAMILIES["llama"], batch_size=4, context_length=256, lora_rank=rank)
    known = facts_of(model, config, WORLD, fusion, 8)
    for keep in KEEP:
        offload = ActivationOffload(META, 4 * 256)
        counted, real = BlockBytes.of(known, keep, True), metered_block(model, config, keep, offload)
        assert sum(offload.parked_sizes[0]) * 4 * 256 == pytest.approx(counted.away, rel=0.005), keep
        assert counted.forward == pytest.approx(real.forward, rel=0.001), keep
        assert counted.kept + counted.away == pytest.approx(real.kept, rel=0.005), keep


@pytest.mark.parametrize("keep", ["input", "qkv", "all"])
@pytest.mark.parametrize("vocabulary", [1024, 32000])
def test_a_whole_step_allocates_what_is_counted(keep: str, vocabulary: int) -> None:
    """With few words the peak is in a block's backward, with many at the head."""
    model, config, fusion = planned(
        LlamaConfig(**SHAPE | {"vocab_size": vocabulary}), batch_size=2, context_length=256, lora_rank=16
    )
    known = facts_of(model, config, WORLD, fusion, 0)  # no optimizer yet, so no state
    real, counted = metered_step(model, config, keep), Memory(known)
    parts, working = counted.step_parts(every(known, keep)), counted.peak(every(known, keep))
    assert working == pytest.approx(real.peak - real.before, rel=0.02)
    assert sum(parts.values()) - working == pytest.approx(real.before, rel=0.005)


def test_encoding_a_block_takes_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, fusion = planned(LlamaConfig(**SHAPE))
    unit = next(u for u in model.units if len(u.sources) > 1)
    entries = unit.frozen.layout.entries
    weights = {source: torch.ones(entries[entry].shape).bfloat16() for entry, source in unit.sources.items()}

    def parts(codec: NF4, weight: torch.Tensor) -> Parts:  # what bitsandbytes' kernels make on a GPU, and no more
        stored = codec.parts(tuple(weight.shape))
        return {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in stored.items()}

    monkeypatch.setattr(NF4, "encode", parts)
    meter = Meter(on="cpu")
    with meter:
        before = meter.mark()
        encode(unit, weights, torch.device("cpu"))
    counted = moments.Loading(facts_of(model, config, WORLD, fusion, 8.0))
    block = unit.frozen.layout.nbytes
    assert block + 0.5 * SHAPE["hidden_size"] * SHAPE["intermediate_size"] < meter.peak - before
    assert meter.peak - before <= block + counted.parts


def test_the_plan_has_the_programs_numbers() -> None:
    assert (memory.TOGETHER, memory.IN_FLIGHT) == (shards.TOGETHER, shards.IN_FLIGHT)
    assert moments.MOST_RANK == glu_lora.MOST_RANK


def test_the_loss_holds_as_many_logits_as_are_counted() -> None:
    for vocabulary in (300, 32000, 65537, 128256, 1 << 20):
        known = replace(facts("llama2_70b", 2, 2048, 64), vocabulary=vocabulary)
        assert moments.chunk_tokens(known) == cross_entropy.chunk_tokens(vocabulary)


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
        here, away = (BlockBytes.of(known, keep, offloaded) for offloaded in (False, True))
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
    assert memory.staged(streamed(0, False)) == known.head_bytes > known.block_bytes == memory.staged(none)
    assert memory.device_bytes(ten) == sum(memory.device_parts(ten).values())
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
    assert (known.hidden, known.inner, known.heads, known.kv_heads, known.head_dim) == (1024, 3584, 16, 4, 64)
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
    ranks = ("rank_qkv", "rank_o", "rank_gate_up", "rank_down")
    assert [getattr(one, name) for name in ranks] == [getattr(everywhere, name) for name in ranks]
    assert BlockBytes.of(one, "all", False) == BlockBytes.of(everywhere, "all", False)
    assert Memory(one).masters * 2 == Memory(everywhere).masters
