"""DoRA on two ranks: wherever the frozen bytes lie and whatever blocks keep, the same training to the last bit.

Its magnitudes begin as norms of the base, which is read from the checkpoint or from the base cache."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.support import tiny
from tests.support.runs import Options, Run, run_alone, run_ranks

OPTIONS: Options = {
    "max_steps": 4, "batch_size": 2, "lora_rank": 8, "lr": 5e-3, "precision": "fp32", "context_length": 64,
    "train_type": "bnb_dora",
}  # fmt: skip
STREAMED: Options = {"use_cpu_offload": True, "resident_blocks": 0}
FSDP2_OFFLOAD: Options = {"use_cpu_offload": True, "cpu_offload_by": "fsdp2"}
FUSED: dict[str, Options] = {
    "ddp-input": {"sharding_strategy": "ddp", "keep_activations": "input"},
    "ddp-all": {"sharding_strategy": "ddp", "keep_activations": "all"},
    "sharded-halves": {"sharding_strategy": "full_shard", "keep_activations": "halves"},
    "shard_grad_op-attention": {"sharding_strategy": "shard_grad_op", "keep_activations": "attention"},
    "fsdp2-offload-qkv": FSDP2_OFFLOAD | {"keep_activations": "qkv"},
    "streamed-input": STREAMED | {"keep_activations": "input"},
    "streamed-kept-on-host": STREAMED | {"keep_activations": "all", "use_activation_cpu_offload": True},
    "streamed-one-resident": STREAMED | {"resident_blocks": 1},
}
GENERIC: dict[str, Options] = {
    "generic": {"fused": "false"},
    "generic-reentrant-sharded": {"fused": "false", "reentrant_checkpointing": True, "sharding_strategy": "full_shard"},
    "generic-keeps-all-streamed": STREAMED | {"fused": "false", "use_gradient_checkpointing": False},
}
CACHED = ("ddp-input", "sharded-halves", "streamed-input")  # a second time, from the cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    tiny.save_model(LlamaConfig(**tiny.SHAPE), folder / "model")
    tiny.save_rows(folder / "rows.jsonl", 21)
    return folder


def options(folder: Path) -> Options:
    return OPTIONS | {"model_name": folder / "model", "dataset": folder / "rows.jsonl"}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    cases = {name: options(folder) | more for name, more in (FUSED | GENERIC).items()}
    cache = {"base_cache": folder / "cache"}
    cases |= {f"{name}-{i}": options(folder) | FUSED[name] | cache for i in range(2) for name in CACHED}
    return run_ranks(cases, 2, folder / "two", timeout=600)


def assert_same_bits(ours: Run, theirs: Run) -> None:
    assert ours.losses == theirs.losses
    tensors = theirs.tensors
    assert ours.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name


@pytest.mark.parametrize("name", [*FUSED, *(f"{name}-{i}" for i in range(2) for name in CACHED)])
def test_placement_and_keep_level_and_cache_change_no_bit(name, runs):
    assert runs[name].losses[-1] < runs[name].losses[0]
    assert_same_bits(runs[name], runs["ddp-all"])


@pytest.mark.parametrize("name", GENERIC)
def test_checkpointing_and_placement_of_generic_blocks_change_no_bit(name, runs):
    assert_same_bits(runs[name], runs["generic"])
    assert runs[name].losses == pytest.approx(runs["ddp-all"].losses, rel=1e-5)


def test_one_rank_begins_and_goes_on_as_two(folder, runs):
    alone = run_alone(options(folder) | {"batch_size": 4}, folder / "one")
    assert alone.losses == pytest.approx(runs["ddp-all"].losses, rel=1e-5)
    for name, tensor in runs["ddp-all"].tensors.items():
        torch.testing.assert_close(alone.tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_dropout_takes_it_off_the_fused_kernels_and_says_so(folder, tmp_path, capsys):
    run = run_alone(options(folder) | {"lora_dropout": 0.2, "max_steps": 2}, tmp_path / "dropped")
    assert "not fused: DoRA's dropout takes a second product with each weight; set lora_dropout to 0" in (
        capsys.readouterr().out
    )
    plain = run_alone(options(folder) | {"max_steps": 2}, tmp_path / "plain")
    assert run.losses[0] != plain.losses[0] or run.losses[1] != plain.losses[1], "nothing was dropped"
