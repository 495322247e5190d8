"""Whole runs with fused blocks: 20 steps are those of generic blocks and of PEFT + bitsandbytes, whatever is kept.

On two ranks (in one launch) with the base sharded, and on one. What a block keeps decides memory and speed alone, so
the losses of all keep levels must be the same to the last bit.
"""

from pathlib import Path

import pytest
import torch

from fsdp_qlora.config.keep import Keep
from tests.models.test_families import FAMILIES, config_of
from tests.runs.test_fidelity import CONTEXT, EXACT, ROWS, options, relative_error
from tests.support import plain, tiny
from tests.support.runs import Run, run_alone, run_ranks
from tests.support.tiers import some_slow

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
GENERIC = {"fused": "false"}
FUSED: dict[str, dict] = {
    **{f"keep-{keep.label}": {"keep_activations": keep.label} for keep in Keep},
    "no-checkpointing": {"use_gradient_checkpointing": False},
    "in-host-memory": {"keep_activations": "attention", "use_activation_cpu_offload": True},
}
ON_TWO_RANKS = {name: {"fused": "true"} | more for name, more in FUSED.items()} | {
    "generic-reentrant": GENERIC | {"reentrant_checkpointing": True},
    "generic-no-checkpointing": GENERIC | {"use_gradient_checkpointing": False},
}
ON_ONE_RANK = {"fused": {"fused": "true"}, "fused-keeps-all": {"keep_activations": "all"}, "generic": GENERIC}
OTHER_FAMILIES = ("Gemma3Text", "Phi3")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    for family in ("Llama", *OTHER_FAMILIES):
        tiny.save_model(config_of(family, FAMILIES[family]), folder / family)
    tiny.save_rows(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def sharded(place) -> dict[str, Run]:
    cases = {name: options(place, "Llama", more) for name, more in ON_TWO_RANKS.items()}
    cases |= {family: options(place, family, {"fused": "true"}) for family in OTHER_FAMILIES}
    return run_ranks(cases, 2, place / "two")


def oracle(place: Path, family: str) -> plain.Outcome:
    rows = plain.read_rows(place / "rows.jsonl", place / family, CONTEXT)
    return plain.train(place / family, rows, plain.Recipe())


@pytest.fixture(scope="module")
def peft(place) -> plain.Outcome:
    truth = oracle(place, "Llama")
    assert abs(truth.losses[-1] - truth.losses[1]) > 0.1, "nothing was learnt: a run that never updates would pass"
    return truth


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_train_what_peft_trains(name, peft, sharded):
    assert relative_error(sharded[name].losses, peft.losses) < EXACT
    assert relative_error([r["grad_norm"] for r in sharded[name].records], peft.norms) < 10 * EXACT


@pytest.mark.parametrize("name", FUSED)
def test_what_is_kept_changes_no_bit(name, sharded):
    assert sharded[name].losses == sharded["keep-all"].losses
    for key, tensor in sharded["keep-all"].tensors.items():
        assert torch.equal(sharded[name].tensors[key], tensor), key


def test_fused_and_generic_blocks_are_not_the_same_code(sharded):
    assert sharded["keep-all"].losses != sharded["generic-no-checkpointing"].losses


@pytest.mark.parametrize("name", some_slow(ON_ONE_RANK, 3))
def test_one_rank_trains_what_peft_trains(name, place, peft):
    run = run_alone(options(place, "Llama", ON_ONE_RANK[name] | {"batch_size": 4}), place / name)
    assert relative_error(run.losses, peft.losses) < EXACT
    assert relative_error([r["grad_norm"] for r in run.records], peft.norms) < 10 * EXACT


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_train_as_with_peft(family, place, sharded):
    truth = oracle(place, family)
    assert relative_error(sharded[family].losses, truth.losses) < EXACT
