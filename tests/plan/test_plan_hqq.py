"""The plan of a base in HQQ: it has no formula of its own, and its numbers are the program's in every width."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.placement.load import encode
from fsdp_qlora.plan.costs import block_costs, trace
from fsdp_qlora.plan.inputs import KEEP, facts_of
from fsdp_qlora.plan.loading import Loading
from fsdp_qlora.weights.codecs import HQQ, Plain
from fsdp_qlora.weights.dummy import Dummy
from tests.plan.test_plan_memory import SHAPE, SMALL
from tests.support.metered import WORLD, Meter, planned

BF16 = torch.bfloat16
CODECS = [HQQ(bits, 64, 1, BF16) for bits in (8, 4, 3, 2, 1)] + [HQQ(3, 32, 0, BF16), HQQ(4, 128, 1, BF16, False)]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_block_takes_its_bits_and_costs_what_its_own_passes_cost(codec):
    model, config, fusion = planned(LlamaConfig(**SHAPE), codec, **SMALL)
    known = facts_of(model, config, WORLD, fusion, 8)
    assert known.codec == codec.name
    stored = known.linear_numbers * (codec.bits + 32 / codec.group) / 8
    assert stored < known.block_bytes < 1.01 * stored + 4096
    own = list(model.blocks.values())[-1].fused
    assert isinstance(own, FusedBlock)
    for keep in KEEP:
        here, away = trace(own, known.batch, known.context, Keep.named(keep))
        assert block_costs(known)[keep, False] == here
        assert block_costs(known)[keep, True] == away
    # Forward decodes each weight once.
    cost = block_costs(known)["all", False]
    assert cost.forward.dequantized == stored + 2 * known.linear_numbers


def test_fewer_bits_move_fewer_bytes_and_take_the_same_launches():
    costs = []
    for codec in CODECS[:5]:
        model, config, fusion = planned(LlamaConfig(**SHAPE), codec, **SMALL)
        costs.append(block_costs(facts_of(model, config, WORLD, fusion, 8))["input", False])
    moved = [cost.forward.dequantized for cost in costs]
    assert moved == sorted(moved, reverse=True)
    assert len({*moved}) == 5
    same = {replace(cost.backward, dequantized=0) for cost in costs}
    assert len(same) == 1, "anything but the decoded bytes depends on the width"


@pytest.mark.parametrize("optimize", [True, False])
def test_encoding_a_block_takes_what_is_counted(optimize, monkeypatch):
    """Of random weights. In float16, as hqq's optimizer computes on a GPU."""
    monkeypatch.setattr("fsdp_qlora.weights.codecs.hqq_groups.optimizer_dtype", lambda device: torch.float16)
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 896}
    model, config, fusion = planned(LlamaConfig(**shape), HQQ(4, 64, 1, BF16, optimize))
    unit = next(u for u in model.units if len(u.sources) > 1)
    entries = unit.frozen.layout.entries
    shapes = {source: entries[entry].shape for entry, source in unit.sources.items()}
    meter = Meter(on="cpu")
    with meter:
        encode(unit, Dummy(BF16).read(shapes, torch.device("cpu")), torch.device("cpu"))
    scratch = Loading(facts_of(model, config, WORLD, fusion, 8.0)).scratch
    block = unit.frozen.layout.nbytes
    assert block + 0.8 * scratch < meter.peak <= block + scratch


def test_norms_stay_as_they_are():
    model, _, _ = planned(LlamaConfig(**SHAPE), HQQ(2, 64, 1, BF16))
    entries = next(iter(model.blocks.values())).frozen.layout.entries
    assert {entry.codec for name, entry in entries.items() if "norm" in name} == {Plain(BF16)}
