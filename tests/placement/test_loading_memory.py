"""What is on a device while a model is loaded, metered over the program's own loading, against what the plan counts."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement import load
from fsdp_qlora.placement.base import Placement
from fsdp_qlora.placement.norms import SeenNorms
from fsdp_qlora.placement.replicated import Replicated
from fsdp_qlora.plan.candidate import BlockPlan, Candidate
from fsdp_qlora.plan.inputs import Facts, facts_of
from fsdp_qlora.plan.loading import Loading
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.rig_plan import RigWorld
from fsdp_qlora.weights.codecs import Plain
from fsdp_qlora.weights.dummy import Dummy
from tests.support.metered import Meter, planned

BF16, CPU = torch.bfloat16, torch.device("cpu")
RANKS = [(0, 1), (0, 2), (1, 2), (0, 4), (3, 4)]
LAYERS = 9


class Dropped(Replicated):
    """A placement that lets go of all: what is left is what loading itself holds."""

    def store(self, unit: Unit, whole: torch.Tensor) -> None:
        pass


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are not there: what they encode arrives as it happens to be."""
    monkeypatch.setattr(load.dist, "broadcast", lambda buffer, src: buffer)


def loaded(placement: Placement, rank: int, ranks: int, vocabulary: int) -> tuple[int, Facts]:
    """Return the most bytes on the device while a model of random weights in 16 bits is loaded, and its facts."""
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=896, num_hidden_layers=LAYERS, num_attention_heads=4,
        vocab_size=vocabulary, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    world = RigWorld(rank, ranks, rank, ranks, CPU)
    model, config, fusion = planned(shape, Plain(BF16), train_type="lora")
    placement.prepare(model)
    meter = Meter(on="cpu")
    with meter:
        encode(model, placement, world)
    return meter.peak, facts_of(model, config, replace(world, device=CPU), fusion, 8.0)


def encode(model: CausalModel, placement: Placement, world: RigWorld) -> None:
    load.encode_units(model.units, model.blocks, Dummy(BF16), placement, world, lambda: None, SeenNorms())


@pytest.mark.parametrize("vocabulary", [512, 16384], ids=["a block is largest", "the tables are"])
@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_loading_holds_what_is_counted(rank: int, ranks: int, vocabulary: int) -> None:
    """A unit and the weight that it is made from, or another rank's block beside it: never two of anything else."""
    peak, known = loaded(Dropped(), rank, ranks, vocabulary)
    of = Loading(known)
    most = max(of.first, of.block, of.head)
    assert peak <= most + (64 << 10)
    if rank == 0:
        assert peak > 0.9 * most


@pytest.mark.parametrize("vocabulary", [512, 16384], ids=["a block is largest", "the tables are"])
@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_blocks_that_stay_are_beside_no_table_that_goes(rank: int, ranks: int, vocabulary: int) -> None:
    peak, known = loaded(Replicated(), rank, ranks, vocabulary)
    everything = Candidate("replicate", (BlockPlan(True, "input", False),) * LAYERS, True, 0)
    parts = Memory(known).loading_parts(everything)
    assert peak <= parts["frozen base"] + parts["unit being encoded"] + (64 << 10)


def test_blocks_are_encoded_together_and_tables_alone() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    names = ["embedding", "b0", "b1", "b2", "head", "rest"]
    turns = load._turns([Named(name) for name in names], {"b0", "b1", "b2"}, 2)  # type: ignore[misc]
    assert [[unit.name for unit in turn] for turn in turns] == [
        ["embedding"], ["b0", "b1"], ["b2"], ["head"], ["rest"]
    ]  # fmt: skip
