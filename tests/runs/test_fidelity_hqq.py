"""HQQ's part of the main claim: two ranks train what PEFT trains over the base that hqq itself decodes.

20 steps in each width, loss by loss, as in test_fidelity.py. Placements, keep levels and checkpointing change no bit.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import LlamaConfig

from tests.runs.test_fidelity import CONTEXT, EXACT, OPTIONS, ROWS, logits_of, relative_error
from tests.support import plain, tiny
from tests.support.runs import Run, run_ranks

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
SHAPE = tiny.SHAPE | {"intermediate_size": 192}  # by groups of 64
HQQ = {"train_type": "hqq_lora"}
# name -> (our options, the oracle's)
CASES: dict[str, tuple[dict, dict]] = {
    **{f"{bits}-bits": ({"n_bits": bits}, {"hqq": (bits, 64, 1)}) for bits in (8, 4, 3, 2, 1)},
    "axis-0": ({"hqq_axis": 0, "hqq_group_size": 32}, {"hqq": (4, 32, 0)}),
    "3-bits-axis-0": ({"n_bits": 3, "hqq_axis": 0, "hqq_group_size": 32}, {"hqq": (3, 32, 0)}),
    "hqq-dora": ({"train_type": "hqq_dora", "n_bits": 3}, {"hqq": (3, 64, 1), "dora": True}),
    "unoptimized-generic": (
        {"n_bits": 3, "hqq_optimize": False, "fused": "false"},
        {"hqq": (3, 64, 1), "hqq_optimize": False},
    ),
}
SAME: dict[str, dict] = {  # in 3 bits, what must not change a bit of it
    "sharded": {"sharding_strategy": "full_shard"},
    "sharded-kept": {"sharding_strategy": "shard_grad_op"},
    "sharded-offloaded": {"use_cpu_offload": True, "cpu_offload_by": "fsdp2"},
    "replicated": {"sharding_strategy": "ddp"},
    "streamed": {"use_cpu_offload": True, "resident_blocks": 0},
    "streamed-in-part": {"use_cpu_offload": True, "resident_blocks": 2},
    "not-checkpointed": {"use_gradient_checkpointing": False},
    **{f"keeps-{keep}": {"keep_activations": keep} for keep in ("input", "halves", "attention", "qkv", "all")},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity-hqq")
    tiny.save_model(LlamaConfig(**SHAPE), folder / "model")
    tiny.save_rows(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def runs(place) -> dict[str, Run]:
    """Every case on two ranks."""
    common = OPTIONS | HQQ | {"model_name": place / "model", "dataset": place / "rows.jsonl", "context_length": CONTEXT}
    cases = {name: common | more for name, (more, _) in CASES.items()}
    cases |= {name: common | {"n_bits": 3, "max_steps": 6} | more for name, more in SAME.items()}
    return run_ranks(cases, 2, place / "two")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_peft_trains_over_hqqs_base(case, place, runs):
    recipe = plain.Recipe(**CASES[case][1])
    rows = plain.read_rows(place / "rows.jsonl", place / "model", CONTEXT)
    truth, run = plain.train(place / "model", rows, recipe), runs[case]
    assert abs(truth.losses[-1] - truth.losses[1]) > 0.1, "nothing was learnt: a run that never updates would pass"
    assert relative_error(run.losses, truth.losses) < EXACT
    assert relative_error([r["grad_norm"] for r in run.records], truth.norms) < 10 * EXACT
    trained = get_peft_model_state_dict(truth.model)
    assert run.tensors.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(run.tensors[name], tensor, rtol=1e-3, atol=1e-4)

    base = plain.load_base(place / "model", recipe)
    ids = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(1))
    without = logits_of(base, ids)
    opened, wanted = logits_of(PeftModel.from_pretrained(base, run.folder), ids), logits_of(truth.model, ids)
    assert (wanted - without).abs().max() > 0.5
    torch.testing.assert_close(opened, wanted, rtol=1e-3, atol=1e-3)


def test_widths_groups_and_axes_are_different_bases(runs):
    first = [runs[case].losses[0] for case in CASES if case != "hqq-dora"]  # begins as its base, which "3-bits" has
    assert len({round(loss, 4) for loss in first}) == len(first)


@pytest.mark.parametrize("case", SAME)
def test_placement_keep_level_and_checkpointing_change_no_bit(case, runs):
    expected, run = runs["sharded"], runs[case]
    assert len(run.losses) == 6
    assert run.losses == expected.losses
    for name, tensor in expected.tensors.items():
        assert torch.equal(run.tensors[name], tensor), name
