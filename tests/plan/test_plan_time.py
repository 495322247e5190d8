"""The plan's time: near what was measured, its queues as a copy engine and a GPU have them, its launches counted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.data.packing import Bins
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.distributed.world import open_world
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.plan.candidate import BlockPlan, Candidate
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.costs import block_costs, trace
from fsdp_qlora.plan.generic import layer_costs
from fsdp_qlora.plan.inputs import KEEP, facts_of
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.weights.codecs import Plain
from fsdp_qlora.weights.frozen_bytes import FrozenTensor
from tests.models.test_fused import CPU
from tests.plan.test_plan_memory import SHAPE
from tests.support import tiny
from tests.support.fusable import inputs, subject
from tests.support.known_runs import H200, MEASURED, facts
from tests.support.metered import planned


@pytest.mark.parametrize("row", MEASURED, ids=[row.name for row in MEASURED])
def test_measured_steps_are_met_within_15_percent(row: Any) -> None:
    assert Clock(row.facts, row.rates).seconds(row.candidate) == pytest.approx(row.seconds, rel=0.15)


def test_a_llama_block_launches_few_kernels() -> None:
    """Forward copies what each level keeps: attention's output and sums, x A^T alone."""
    model, config, _ = planned(LlamaConfig(**SHAPE), batch_size=1, context_length=128, lora_rank=16)
    block = list(model.blocks.values())[-1].fused  # the first may copy its input
    assert isinstance(block, FusedBlock)
    traced = [trace(block, 1, config.data.context_length, keep)[0] for keep in Keep]
    assert [cost.forward.launches for cost in traced] == [21, 21, 23, 24, 25]
    assert [cost.backward.launches for cost in traced] == [47, 38, 38, 35, 33]


def test_flops_are_four_per_parameter_and_token_and_six_with_everything_recomputed() -> None:
    """But for o and down, which are never, and o, which is at `input` alone."""
    known = facts("llama2_70b", 2, 512, 0, adapted="0" * 7)
    costs, two = block_costs(known), 2 * known.tokens
    parameters, down, o = known.linear_numbers, known.hidden * known.intermediate, known.hidden * known.queries
    recomputed = {"input": parameters - down, "halves": parameters - down - o, "all": 0}
    for keep, numbers in recomputed.items():
        cost = costs[keep, False]
        assert cost.forward.forward == two * parameters
        assert cost.backward.backward == two * parameters
        assert cost.backward.forward == two * numbers
        assert cost.forward.skinny == cost.backward.skinny == 0


def test_an_adapter_is_columns_of_a_matmul_or_a_skinny_one() -> None:
    bare, adapted = (
        block_costs(facts("llama2_70b", 2, 512, 16, adapted=mark * 7))["all", False].forward for mark in "01"
    )
    known = facts("llama2_70b", 2, 512, 16)
    two, rank = 2 * known.tokens, known.lora_rank
    beside = rank * (3 * known.qkv + 2 * 2 * known.intermediate + known.hidden)  # B's, those of one input side by side
    assert adapted.forward - bare.forward == two * beside
    assert adapted.skinny == two * rank * (
        3 * known.hidden + known.queries + known.hidden + 2 * known.hidden + known.intermediate
    )


def test_weights_are_dequantized_once_for_a_pass_or_for_both_a_recomputation_and_its_gradients() -> None:
    known = facts("llama2_70b", 2, 512, 16)
    o = known.hidden * known.queries / known.linear_numbers
    for keep, times in (("all", 1), ("halves", 1), ("input", 1 + known.qkv * known.hidden / known.linear_numbers + o)):
        cost = block_costs(known)[keep, False]
        assert cost.forward.dequantized == pytest.approx(known.block_bytes + 2 * known.linear_numbers, rel=1e-3)
        assert cost.backward.dequantized == pytest.approx(times * cost.forward.dequantized, rel=1e-3)


def test_flash_attn_is_repeated_at_every_level() -> None:
    for attention, repeated in (("flash_attn", KEEP), ("cudnn", KEEP[: KEEP.index("attention")])):
        known = facts("llama3_8b", 4, 2048, 16, attention=attention)
        for (keep, _), cost in block_costs(known).items():
            flops = 4 * known.tokens * known.keys_per_query * known.queries
            assert cost.forward.attention == flops
            assert cost.backward.attention == (flops if keep in repeated else 0), (attention, keep)
            assert cost.backward.attention_backward == 2.5 * flops


def test_windows_are_counted_as_the_mean_of_the_blocks() -> None:
    known = facts("llama3_8b", 1, 4096, 16)
    keys = known.keys_per_query
    whole, half = (block_costs(replace(known, keys_per_query=keys * share))["input", False] for share in (1, 0.5))
    assert half.forward.attention == whole.forward.attention / 2
    assert half.backward.attention_backward == whole.backward.attention_backward / 2
    assert half.forward.bytes == whole.forward.bytes


def streamed(layers: int, resident: int = 0, keep: str = "input", head: bool = True, staging: int = 3) -> Candidate:
    blocks = tuple(BlockPlan(i >= layers - resident, keep, False) for i in range(layers))
    return Candidate("stream", blocks, head, staging)


def with_link(rate: float) -> Rates:
    return replace(H200, h2d=rate, h2d_both=rate, d2h_both=rate)


def test_a_slow_link_is_all_that_counts_and_what_turns_round_is_not_copied_again() -> None:
    known = facts("llama2_70b", 2, 512, 64)
    clock = Clock(known, with_link(1e9))
    expected = (2 * (known.layers - 3) * known.block_bytes + known.tokens * known.hidden * 2) / 1e9
    seconds = clock.seconds(streamed(known.layers))
    assert seconds == pytest.approx(expected, rel=0.01)
    assert clock.seconds(streamed(known.layers, head=False)) - seconds == pytest.approx(
        (known.head_bytes + known.block_bytes) / 1e9, rel=0.02
    )  # the head takes a buffer that would have kept a block over the turn
    half = clock.seconds(streamed(known.layers, resident=40))
    assert half == pytest.approx((2 * (40 - 3) * known.block_bytes) / 1e9, rel=0.02)


def test_a_fast_link_hides_behind_arithmetic() -> None:
    known = facts("llama2_70b", 2, 2048, 64)
    clock, everything = Clock(known, with_link(1e15)), Candidate("replicate", streamed(80, 80).blocks, True, 0)
    assert clock.seconds(streamed(known.layers)) == pytest.approx(clock.seconds(everything), rel=1e-3)
    assert clock.bound(everything) <= clock.seconds(everything) * (1 + 1e-12)


@pytest.mark.parametrize("rate", [5e9, 55e9])
def test_seconds_are_never_below_their_bound(rate: float) -> None:
    known = facts("llama3_70b", 1, 2048, 64, ranks=2)
    clock = Clock(known, with_link(rate))
    for keep in KEEP:
        for offloaded in (False, True):
            for resident in (0, 30, 79):
                for head in (True, False):
                    blocks = tuple(BlockPlan(i < resident, keep, offloaded) for i in range(80))
                    candidate = Candidate("stream", blocks, head, 2)
                    assert clock.seconds(candidate) >= clock.bound(candidate) * 0.999
    for placement in ("shard", "shard_offload"):
        candidate = Candidate(placement, (BlockPlan(False, "input", False),) * 80, True, 0)  # type: ignore[arg-type]
        assert clock.seconds(candidate) >= clock.bound(candidate) * 0.999


def test_what_is_offloaded_waits_for_a_slow_link_and_not_for_a_fast_one() -> None:
    known = facts("llama3_8b", 4, 2048, 16)

    def both(rate: float) -> tuple[float, float]:
        clock = Clock(known, with_link(rate))
        here, away = (
            Candidate("replicate", (BlockPlan(True, "attention", off),) * 32, True, 0) for off in (False, True)
        )
        return clock.seconds(here), clock.seconds(away)

    here, away = both(55e9)
    assert away == pytest.approx(here, rel=0.05)
    here, away = both(5e9)
    assert away > 2 * here


def test_micro_batches_add_up_and_a_step_ends_once() -> None:
    one, four = (Clock(facts("llama3_8b", 1, 512, 16, accumulation=n), H200) for n in (1, 4))
    candidate = Candidate("replicate", (BlockPlan(True, "all", False),) * 32, True, 0)
    assert 3.5 * one.seconds(candidate) < four.seconds(candidate) < 4 * one.seconds(candidate)


def test_short_rows_take_the_memory_of_the_most_tokens_and_the_time_of_the_usual_ones() -> None:
    full = facts("llama2_70b", 2, 2048, 64, ranks=2)
    short = replace(full, mean_tokens=512, mean_row=128, keys_per_query=64.5)
    blocks = (BlockPlan(True, "input", False),) * full.layers
    candidate = Candidate("replicate", blocks, True, 0)
    clocks = [Clock(known, H200) for known in (full, short)]
    peaks = [sum(clock.memory.step_parts(candidate, None).values()) for clock in clocks]
    assert peaks[0] == peaks[1]
    seconds = [clock.arithmetic(candidate) for clock in clocks]
    assert seconds[0] / 8 < seconds[1] < seconds[0] / 4, "an eighth of the tokens, and all of the weights to decode"
    same = Clock(replace(full, mean_tokens=full.tokens, mean_row=full.context), H200)
    assert same.arithmetic(candidate) == pytest.approx(seconds[0], rel=1e-3)


def test_the_facts_of_rows_are_those_of_the_rows() -> None:
    model, config, fusion = planned(LlamaConfig(**SHAPE), batch_size=4, context_length=128, lora_rank=16)
    lengths = RowLengths(np.array([100, 10, 30, 20, 20, 20, 20, 20]), 104, 0.5)
    with open_world(config.launch, 0) as world:
        known = facts_of(model, config, world, fusion, 8.0, lengths=lengths)
        packed = replace(lengths, widest=128, bins=Bins(128, lengths.lengths))
        in_bins = facts_of(model, config, world, fusion, 8.0, lengths=packed)
    assert 100 + 3 * 20 <= known.tokens <= 4 * 48
    assert (known.mean_tokens, known.mean_row, known.label_share) == (120, 30, 0.5)
    assert known.keys_per_query == pytest.approx(sum(n * (n + 1) / 2 for n in lengths.lengths) / 240)
    assert known.flat
    assert in_bins.flat
    assert in_bins.tokens == 4 * 128
    assert (in_bins.mean_tokens, in_bins.keys_per_query) == (round(240 / 2 * 2), known.keys_per_query)


ONE_BLOCK = LlamaConfig(**tiny.SHAPE | {"num_hidden_layers": 1})


def test_dora_with_dropout_multiplies_twice_with_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such blocks are generic: the dropped input and the other both meet the weight, forward and back."""
    decoded: list[str] = []
    decode = FrozenTensor.decode

    def counted(weight: FrozenTensor, *given: Any) -> torch.Tensor:
        decoded.append(weight.name)
        return decode(weight, *given)

    monkeypatch.setattr(FrozenTensor, "decode", counted)

    def decodings(dropout: float) -> int:
        """Of a weight, in a layer's passes."""
        adapter = AdapterOptions(lora_rank=2, lora_dropout=dropout)
        of = subject(ONE_BLOCK, torch.float32, CPU, Plain(torch.float32), adapter, kind="dora")
        of.fuse(fused="false")
        decoded.clear()
        of.run(*inputs(of.hf_config, (2, 16), torch.float32, CPU))
        return decoded.count("mlp.down_proj.weight")

    assert decodings(0.1) == decodings(0.0) + 2
    known = replace(facts("llama3_8b", 2, 512, 16), adapter="dora", fused=False, attention="")
    alone, both = (layer_costs(replace(known, dropout=p))["input", False] for p in (0.0, 0.1))
    assert both.forward.forward / alone.forward.forward == pytest.approx(2, rel=0.01)
    assert both.backward.backward / alone.backward.backward == pytest.approx(2, rel=0.01)
    assert both.backward.dequantized == 2 * alone.backward.dequantized
    assert alone.once.dequantized == both.once.dequantized > 0, "rows are measured once a step"
