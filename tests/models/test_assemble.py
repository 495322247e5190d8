"""Assembly: blocks are complete when they are made, and what they save changes by one door."""

import pytest
import torch

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.parse import parse
from fsdp_qlora.models.fused.fuse import fuse
from fsdp_qlora.models.generic_block import FrozenLayer
from fsdp_qlora.plan.shape_key import model_key
from tests.models.test_families import FAMILIES, config_of
from tests.support.fusable import Subject, inputs, subject
from tests.support.runs import flags

CPU = torch.device("cpu")


@pytest.fixture
def of() -> Subject:
    return subject(config_of("Gemma2", FAMILIES["Gemma2"]), torch.float32, CPU)


def test_making_passes_changes_neither_model_nor_layers(of):
    layers = [FrozenLayer(block.layer, block.frozen, block.views) for block in of.model.blocks.values()]
    before = model_key(of.model)
    config = parse(flags({"model_name": "none", "context_length": 64}))
    passes, fusion = fuse(config, CPU, layers, of.model.backbone, of.model.precision, copies_input=True)
    assert fusion.blocks == len(passes) == len(layers)
    assert [one.copies_input for one in passes] == [True] + [False] * (len(layers) - 1)
    assert model_key(of.model) == before


def test_a_model_has_passes_for_all_its_blocks_or_for_none(of):
    assert of.model.fused_blocks == []
    of.fuse()
    assert [block.fused for block in of.model.blocks.values()] == of.model.fused_blocks
    assert all(one.keep is Keep.INPUT and not one.offloads for one in of.model.fused_blocks)


def test_keep_levels_are_set_for_each_block_and_specs_stay(of):
    of.fuse()
    specs = [one.spec for one in of.model.fused_blocks]
    levels = [Keep.ALL, Keep.INPUT, Keep.QKV][: len(specs)]
    of.model.keep([(level, False) for level in levels], None)
    assert [one.keep for one in of.model.fused_blocks] == levels
    assert all(one.spec is spec for one, spec in zip(of.model.fused_blocks, specs, strict=True))
    with pytest.raises(ValueError, match="zip"):
        of.model.keep([(Keep.ALL, True)], None)
    assert [one.keep for one in of.model.fused_blocks] == levels, "nothing is set where something is wrong"
    assert not any(one.offloads for one in of.model.fused_blocks)


def test_other_passes_compute_the_blocks_inside_alone(of):
    of.fuse()
    h, _ = inputs(of.hf_config, (1, 5), torch.float32, CPU)
    wanted, own = of.forward(h), of.model.fused_blocks
    with of.model.computing_by([lambda h, *_: h] * len(own)):
        assert torch.equal(of.forward(h), h), "none of the blocks does anything"
    assert torch.equal(of.forward(h), wanted)

    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), of.model.computing_by([fails] * len(own)):
        of.forward(h)
    assert of.model.fused_blocks == own
    with pytest.raises(ValueError, match="zip"), of.model.computing_by([fails]):
        of.forward(h)
    assert of.model.fused_blocks == own
    assert torch.equal(of.forward(h), wanted)
