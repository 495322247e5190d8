"""What is on a device while a model is loaded, metered over the program's own loading, against what the plan counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement import from_cache, load
from fsdp_qlora.placement.base import Placement
from fsdp_qlora.placement.norms import SeenNorms
from fsdp_qlora.placement.replicated import Replicated
from fsdp_qlora.plan.candidate import BlockPlan, Candidate
from fsdp_qlora.plan.inputs import Facts, facts_of
from fsdp_qlora.plan.loading import Loading
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.rig_plan import RigWorld
from fsdp_qlora.weights.base_cache.kept import KeptBase, UnitKey
from fsdp_qlora.weights.base_cache.lanes import Lanes
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


class Alone(RigWorld):
    """A rank whose peers hold and say what it does."""

    def gather_texts(self, text: str) -> list[str]:
        return [text] * self.size


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are not there: what they have arrives as it happens to be."""
    monkeypatch.setattr(load.dist, "broadcast", lambda buffer, src: buffer)
    monkeypatch.setattr(from_cache, "all_gather", lambda whole, own: whole)


def made(rank: int, ranks: int, vocabulary: int, dummy_weights: bool = True) -> tuple[CausalModel, Alone, Facts]:
    """Return a model in 16 bits without its weights, this rank, and what the plan knows of both."""
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=896, num_hidden_layers=LAYERS, num_attention_heads=4,
        vocab_size=vocabulary, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    world = Alone(rank, ranks, rank, ranks, CPU)
    model, config, fusion = planned(shape, Plain(BF16), train_type="lora")
    return model, world, replace(facts_of(model, config, world, fusion, 8.0), dummy_weights=dummy_weights)


def most_encoding(model: CausalModel, placement: Placement, world: Alone) -> int:
    """Return the most bytes on the device while random weights are made, encoded and placed."""
    placement.prepare(model)
    with Meter(on="cpu") as meter:
        load.encode_units(model.units, model.blocks, Dummy(BF16), placement, world, lambda: None, SeenNorms())
    return meter.peak


def most_reading(model: CausalModel, placement: Placement, world: Alone, folder: Path) -> int:
    """Return the most bytes on the device while all units are read from the base cache."""
    kept = KeptBase(folder, {u.name: UnitKey(u.frozen.layout, u.origins) for u in model.units}, "", "", "", {})
    kept.make()
    placement.prepare(model)
    with Lanes(2, CPU) as lanes:
        for unit in model.units:
            whole = torch.zeros(unit.frozen.layout.nbytes, dtype=torch.uint8)
            writing = kept.begin(unit.name, 0)
            lanes.store(writing, whole, unit.frozen.layout.used)
            writing.finish()
        del whole
        with Meter(on="cpu") as meter:
            left, _ = from_cache.place_kept(model.units, kept, placement, lanes, world, lambda: None, SeenNorms())
    assert left == [], "a file was not taken"
    return meter.peak


def everywhere(known: Facts) -> dict[str, int]:
    blocks = (BlockPlan(True, "input", False),) * known.layers
    return Memory(known).loading_parts(Candidate("replicate", blocks, True, 0))


SMALL = 64 << 10  # bytes of sums and flags
tables = pytest.mark.parametrize("vocabulary", [512, 16384], ids=["a block is largest", "the tables are"])
ranked = pytest.mark.parametrize(("rank", "ranks"), RANKS)


@tables
@ranked
def test_loading_holds_what_is_counted(rank: int, ranks: int, vocabulary: int) -> None:
    """A unit and the weight that it is made from, or another rank's block beside it: never two of anything else."""
    model, world, known = made(rank, ranks, vocabulary)
    peak, of = most_encoding(model, Dropped(), world), Loading(known)
    most = max(of.first, of.block, of.head)
    assert peak <= most + SMALL
    if rank == 0:
        assert peak > 0.9 * most


@tables
@ranked
def test_blocks_that_stay_are_beside_no_table_that_goes(rank: int, ranks: int, vocabulary: int) -> None:
    model, world, known = made(rank, ranks, vocabulary)
    parts = everywhere(known)
    assert most_encoding(model, Replicated(), world) <= parts["frozen base"] + parts["unit being encoded"] + SMALL


@tables
@pytest.mark.parametrize("ranks", [1, 2])
def test_reading_a_cached_base_holds_what_is_counted(ranks: int, vocabulary: int, tmp_path: Path) -> None:
    """Any unit, beside the block that comes next."""
    model, world, known = made(0, ranks, vocabulary, dummy_weights=False)
    of, two = Loading(known), max(known.embedding_bytes, known.block_bytes) + known.block_bytes
    assert two <= max(of.first, of.block, of.head)
    assert 0.9 * two < most_reading(model, Dropped(), world, tmp_path) <= two + SMALL


@tables
@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_blocks_that_stay_are_beside_what_is_counted(ranks: int, vocabulary: int, tmp_path: Path) -> None:
    model, world, known = made(0, ranks, vocabulary, dummy_weights=False)
    parts = everywhere(known)
    most = parts["frozen base"] + parts["unit being encoded"]
    assert most_reading(model, Replicated(), world, tmp_path) <= most + SMALL


def test_blocks_are_encoded_together_and_tables_alone() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    names = ["embedding", "b0", "b1", "b2", "head", "rest"]
    turns = load._turns([Named(name) for name in names], {"b0", "b1", "b2"}, 2)  # type: ignore[misc]
    assert [[unit.name for unit in turn] for turn in turns] == [
        ["embedding"], ["b0", "b1"], ["b2"], ["head"], ["rest"]
    ]  # fmt: skip
