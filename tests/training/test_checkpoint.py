"""A run that goes on from a checkpoint is the run that was never interrupted, to the last bit."""

import errno
import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from fsdp_qlora.config.options import OPTIONS
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.training import checkpoint as checkpoints
from fsdp_qlora.training import checkpoint_folder
from fsdp_qlora.training.agreement import MAY_DIFFER
from fsdp_qlora.training.checkpoint_folder import MANIFEST, checkpoints_in, read_checkpoint, write_manifest
from fsdp_qlora.training.tensor_file import TensorFile
from tests.support import tiny
from tests.support.runs import Options, Run, flags, run_alone, run_ranks

ROWS = 21  # by fours: the sixth step of an epoch has one row
STEPS, SAVED = 7, 3
EXACT = 1e-5  # of a float32 loss, relative
STREAMED = {"use_cpu_offload": True, "resident_blocks": 0, "keep_activations": "input"}
SHARDED = {"sharding_strategy": "full_shard", "use_cpu_offload": False, "keep_activations": "all"}
REPLICATED = {"sharding_strategy": "ddp", "use_cpu_offload": False, "keep_activations": "qkv"}
PLACING = {**STREAMED, **SHARDED, **REPLICATED}
# name -> (options, what is changed of them where the run goes on): on two ranks
CASES: dict[str, tuple[Options, Options]] = {
    "bf16": ({"precision": "bf16", "lora_dropout": 0.1, **STREAMED}, SHARDED),
    "8bit": ({"precision": "bf16", "optimizer": "adamw_8bit", **SHARDED}, REPLICATED),
    "fp32": ({"precision": "fp32", "optimizer": "fused_adamw", "wd": 0.1, **REPLICATED}, STREAMED),
}


@dataclass(frozen=True)
class Place:
    """A model, rows, and runs over them."""

    folder: Path

    def options(self, **more: object) -> Options:
        return {
            "model_name": self.folder / "model",
            "dataset": self.folder / "rows.jsonl",
            "context_length": 56,
            "rows_cache": "null",
            "num_epochs": 2,
            "max_steps": STEPS,
            "batch_size": 4,
            "lora_rank": 8,
            "lr": 5e-3,
        } | more


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.save_model(LlamaConfig(**tiny.SHAPE), folder / "model")
    tiny.save_rows(folder / "rows.jsonl", ROWS)
    return Place(folder)


@pytest.fixture(scope="module")
def alone(place) -> Run:
    """A float32 run on one rank, with dropout, and checkpoints of it."""
    options = place.options(precision="fp32", optimizer="fused_adamw", wd=0.1, save_steps=SAVED, **REPLICATED)
    return run_alone(options, place.folder / "alone")


@pytest.fixture(scope="module")
def on_two(place, alone) -> dict[str, Run]:
    """Each case without interruption, the same from its checkpoint on, and `alone` from its checkpoint on."""
    cases: dict[str, Options] = {}
    for name, (options, changes) in CASES.items():
        cases[name] = place.options(batch_size=2, save_steps=SAVED) | options
        going_on = {"resume": place.folder / "two" / name / f"checkpoint-{SAVED}"}
        cases[f"{name} goes on"] = {k: v for k, v in cases[name].items() if k not in PLACING} | changes | going_on
    cases["from one"] = cases["fp32"] | {"resume": alone.folder / f"checkpoint-{SAVED}"}
    return run_ranks(cases, 2, place.folder / "two")


def same_run(run: Run, other: Run) -> bool:
    """Whether two runs trained the same to the last bit."""
    numbers = [[(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in one.records] for one in (run, other)]
    tensors = (run.tensors, other.tensors)
    assert tensors[0].keys() == tensors[1].keys()
    return numbers[0] == numbers[1] and all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks_a_run_goes_on_to_the_bit_with_another_placement_and_other_keep_levels(name, on_two):
    assert len(on_two[name].records) == STEPS
    assert same_run(on_two[name], on_two[f"{name} goes on"])


def test_from_one_rank_to_two_and_back_a_run_goes_on_as_one_of_that_number(place, alone, on_two, capsys):
    back = run_alone(
        place.options(precision="fp32", optimizer="fused_adamw", wd=0.1)
        | {"resume": on_two["fp32"].folder / f"checkpoint-{SAVED}"},
        place.folder / "back",
    )
    for run, whole in ((on_two["from one"], on_two["fp32"]), (back, alone)):
        assert run.losses == pytest.approx(whole.losses, rel=EXACT)
        assert not same_run(run, whole), "sums over another number of ranks round otherwise: nothing was resumed"
    assert "1 rank instead of 2: sums over ranks round otherwise" in capsys.readouterr().out


def test_optimizer_state_that_belongs_to_slices_needs_as_many_ranks(place, on_two, capsys):
    options = place.options(precision="bf16", optimizer="adamw_8bit")
    options |= {"resume": on_two["8bit"].folder / f"checkpoint-{SAVED}", "output_dir": place.folder / "refused"}
    assert train.main(flags(options)) == 2
    said = capsys.readouterr().err
    assert "was made on 2 ranks and this run has 1: the 8-bit state of adamw_8bit cannot be cut anew" in said


def continued(place: Place, alone: Run, name: str, **changes: object) -> tuple[Options, Path]:
    """Options that go on with a copy of `alone` in which the last checkpoint is at SAVED, and its folder."""
    folder = place.folder / name
    shutil.copytree(alone.folder, folder)
    for step, path in checkpoints_in(folder).items():
        if step > SAVED:
            shutil.rmtree(path)
    options = place.options(precision="fp32", optimizer="fused_adamw", wd=0.1, save_steps=SAVED, resume="auto")
    return options | changes, folder


@pytest.mark.slow
def test_auto_goes_on_in_the_folder_and_the_record_is_one(place, alone, capsys):
    options, folder = continued(place, alone, "auto")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # as a killed run leaves it
    for name in (".checkpoint-6.part", ".checkpoint-6.old", ".checkpoint-6.part.old", ".checkpoint-notes"):
        (folder / name).mkdir()
    (folder / checkpoints.ON_REQUEST).mkdir()  # which cannot be removed as a file
    run = run_alone(options, folder)
    assert same_run(run, alone)
    assert list(checkpoints_in(folder)) == [SAVED, SAVED + 1, 2 * SAVED, STEPS]
    assert [path.name for path in folder.glob(".checkpoint*")] == [".checkpoint-notes"]
    assert capsys.readouterr().out.count("SAVE cannot be removed") == 1


@pytest.mark.slow
def test_auto_starts_where_there_is_nothing_and_ends_where_all_is_done(place, alone, capsys):
    options = place.options(precision="fp32", optimizer="fused_adamw", wd=0.1, resume="auto", save_steps=STEPS)
    folder = place.folder / "nothing"
    assert same_run(run_alone(options, folder), alone)
    assert "has no checkpoint yet: from the beginning" in capsys.readouterr().out
    assert same_run(run_alone(options, folder), alone)
    assert f"checkpoint-{STEPS}: {STEPS} steps are done" in capsys.readouterr().out
    shutil.rmtree(folder / f"checkpoint-{STEPS}")  # as a crash before the first one that saved the adapter leaves it
    assert train.main(flags(options | {"output_dir": folder, "lr": 1e-3})) == 2, "another run's adapter"
    assert "is not empty" in capsys.readouterr().err
    run_alone(options, folder)
    assert "has no checkpoint yet: from the beginning" in capsys.readouterr().out


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "rank-00000-of-00001.safetensors", MANIFEST])
def test_of_a_damaged_checkpoint_the_one_before_is_taken_but_not_instead_of_a_path(place, alone, file, capsys):
    options, folder = continued(place, alone, f"damaged {file}", max_steps=SAVED + 1)
    shutil.copytree(alone.folder / f"checkpoint-{2 * SAVED}", folder / f"checkpoint-{2 * SAVED}")
    damage(folder / f"checkpoint-{2 * SAVED}" / file)
    assert train.main(flags(options | {"output_dir": folder, "resume": folder / f"checkpoint-{2 * SAVED}"})) == 2
    assert f"checkpoint-{2 * SAVED} is no whole checkpoint ({file} is" in capsys.readouterr().err
    run_alone(options, folder)
    said = capsys.readouterr().out
    assert f"checkpoint-{2 * SAVED} is damaged ({file} is" in said
    assert f"checkpoint-{SAVED}: {SAVED} steps are done" in said
    assert f"removed   checkpoint-{2 * SAVED}" in said
    assert list(checkpoints_in(folder)) == [SAVED, SAVED + 1]


def test_what_a_disk_does_not_give_or_another_version_wrote_is_not_damaged(place, alone, capsys):
    options, folder = continued(place, alone, "unread", output_dir=place.folder / "unread")
    last = folder / f"checkpoint-{2 * SAVED}"
    shutil.copytree(alone.folder / last.name, last)
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(last / MANIFEST))
    with patch.object(checkpoint_folder, "checksum", side_effect=stale):
        assert train.main(flags(options)) == 2
    assert f"{MANIFEST} cannot be read (Stale file handle)" in capsys.readouterr().err
    write_manifest(last, replace(read_checkpoint(last).manifest, version=2))
    assert train.main(flags(options)) == 2
    assert f"resume: {last} is in version 2 of the layout and this program reads 1" in capsys.readouterr().err
    assert list(checkpoints_in(folder)) == [SAVED, 2 * SAVED]


def test_a_checkpoint_that_is_a_link_is_one_of_the_folder_that_it_is_seen_in(alone, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"checkpoint-{SAVED}").symlink_to(alone.folder / f"checkpoint-{SAVED}")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    linked = read_checkpoint(tmp_path / "link" / f"checkpoint-{SAVED}")
    assert linked.is_in(tmp_path / "run")
    assert linked.is_in(alone.folder)
    assert not linked.is_in(tmp_path)
    assert linked.run_folder(tmp_path) == tmp_path / "link"


REFUSED: dict[str, tuple[Options, list[str]]] = {
    "options": ({"lora_rank": 4, "seed": 1}, ["lora_rank 4 (was 8), seed 1 (was 42)", "set them as before"]),
    "rows": ({"context_length": 40}, ["was made with other rows", "context_length 40 (was 56)"]),
    "rows in a step": ({"batch_size": 2}, ["had 4 rows in a step and this run has 2"]),
    "too few steps": ({"max_steps": 2}, ["has 3 steps behind it and this run ends after 2"]),
    "other weights": ({"dummy_weights": True}, ["over other frozen weights", "dummy_weights true (was false)"]),
    "no checkpoint": ({"resume": "."}, ["checkpoint.json cannot be read (No such file"]),
    "later ones": ({"resume": "{folder}/checkpoint-3"}, ["has later checkpoints than", "checkpoint-6, checkpoint-7"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_the_same_run_is_refused_in_one_line(name, place, alone, capsys):
    changes, words = REFUSED[name]
    options, folder = continued(place, alone, f"refused {name}")
    if name == "later ones":
        shutil.rmtree(folder)
        shutil.copytree(alone.folder, folder)
        changes = {"resume": folder / f"checkpoint-{SAVED}"}
    before = sorted((file, file.stat().st_size) for file in folder.rglob("*") if file.name != "plan.json")
    assert train.main(flags(options | changes | {"output_dir": folder})) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("train.py: resume: ")
    for word in words:
        assert word in said[0]
    assert sorted((file, file.stat().st_size) for file in folder.rglob("*") if file.name != "plan.json") == before


@pytest.mark.slow
def test_weights_that_another_device_encoded_are_gone_on_with_and_said(place, alone, capsys):
    options, folder = continued(place, alone, "another device", dummy_weights=True)
    saved = read_checkpoint(folder / f"checkpoint-{SAVED}")
    elsewhere = replace(saved.manifest, base=saved.manifest.base | {"device": "NVIDIA GeForce RTX 3090"})
    write_manifest(saved.path, elsewhere)
    run = run_alone(options, folder)
    said = capsys.readouterr().out
    assert "was made on another device (NVIDIA GeForce RTX 3090, here " in said
    assert "that they are the same model is not checked" in said
    assert len(run.records) == STEPS


def test_options_that_may_differ_are_options_of_groups_that_must_agree():
    assert {OPTIONS[name].group for name in MAY_DIFFER} == {"model", "data", "training"}
    assert {"lora_dropout", "seed", "optimizer", "precision"}.isdisjoint(MAY_DIFFER)


@pytest.mark.slow
def test_what_may_change_is_said(place, alone, capsys):
    options, folder = continued(place, alone, "changed", max_steps=STEPS + 1, lr=1e-3)
    run = run_alone(options, folder)
    assert "not as before: max_steps 8 (was 7), lr 0.001 (was 0.005)" in capsys.readouterr().out
    assert run.losses[: SAVED + 1] == alone.losses[: SAVED + 1]
    assert run.records[SAVED]["lr"] < 1e-3


def test_peft_opens_a_checkpoint_and_the_last_one_is_the_adapter(place, alone):
    last = Run(alone.folder / f"checkpoint-{STEPS}")
    assert last.tensors.keys() == alone.tensors.keys()
    assert all(torch.equal(tensor, alone.tensors[name]) for name, tensor in last.tensors.items())
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    opened = PeftModel.from_pretrained(base, last.folder).state_dict()
    for name, tensor in last.tensors.items():
        assert torch.equal(opened[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.slow
def test_a_file_asks_for_a_checkpoint_and_old_ones_go_but_the_best(place, capsys):
    folder = place.folder / "on request"
    folder.mkdir()
    options = place.options(max_steps=5, save_steps=2, save_total_limit=2, overwrite_output_dir=True, batch_size=-1)
    (folder / checkpoints.ON_REQUEST).touch()
    for step in (80, 90):
        (folder / f"checkpoint-{step}").mkdir()
    (folder / "checkpoint-90" / MANIFEST).touch()  # of a run that this one replaces; the other is some program's
    best = checkpoints.Best()
    best.step = 1
    with patch.object(checkpoints, "Best", lambda: best):
        run_alone(options, folder)
    assert list(checkpoints_in(folder)) == [1, 5, 80], "2 went when 4 was whole, 4 when 5 was"
    assert not (folder / checkpoints.ON_REQUEST).exists()
    assert read_checkpoint(folder / "checkpoint-5").manifest.options["batch_size"] > 0, "what the plan chose"
    assert "removed   checkpoint-90 in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_makes_a_checkpoint_and_the_run_goes_on_from_it(place, alone):
    options = place.options(precision="fp32", optimizer="fused_adamw", wd=0.1, resume="auto")
    folder = place.folder / "stopped"
    note = Metrics.on_step

    def stop(metrics: Metrics, record) -> None:
        note(metrics, record)
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    # As where gathers of the last values wait for the next forward: ranks differ in the steps that they have in full.
    with patch.object(Metrics, "on_step", stop), patch.object(ShardedAdapters, "has_arrived", lambda _: False):
        assert train.main(flags(options | {"output_dir": folder})) == 128 + signal.SIGUSR1
    assert list(checkpoints_in(folder)) == [2]
    assert same_run(run_alone(options, folder), alone)


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_written_is_obeyed_behind_it(place):
    options = place.options(save_steps=2, output_dir=place.folder / "stopped in it")
    save = checkpoints.Checkpoints.save

    def stop(one: checkpoints.Checkpoints, step: int) -> Path | None:
        os.kill(os.getpid(), signal.SIGUSR1)
        return save(one, step)

    with patch.object(checkpoints.Checkpoints, "save", stop):
        assert train.main(flags(options)) == 128 + signal.SIGUSR1
    assert [record["step"] for record in Run(place.folder / "stopped in it").records] == [1, 2]


FAILURES = {
    "disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
    "GPU": (torch.OutOfMemoryError("CUDA out of memory"), "GPU memory ran out: CUDA out of memory"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_full_disk_or_gpu_costs_a_checkpoint_and_not_the_run(name, place, alone, capsys):
    options = place.options(precision="fp32", optimizer="fused_adamw", wd=0.1, save_steps=SAVED)
    (failure, words), write, fails = FAILURES[name], TensorFile.write, [True]

    def full(file: TensorFile, name: str, tensor: torch.Tensor) -> None:
        if fails and ".exp_avg" in name:
            fails.clear()
            raise failure
        write(file, name, tensor)

    with patch.object(TensorFile, "write", full):
        run = run_alone(options, place.folder / f"full {name}")
    assert same_run(run, alone)
    said = capsys.readouterr().out
    assert said.count(f"step {SAVED}: no checkpoint could be written") == 1
    assert f"({words}); training goes on" in said
    assert list(checkpoints_in(run.folder)) == [2 * SAVED, STEPS]
    assert not list(run.folder.glob(".checkpoint*"))


def test_a_disk_without_room_for_all_checkpoints_is_told_before_anything_is_loaded(place, capsys):
    options = place.options(save_steps=1, output_dir=place.folder / "small disk")
    one = 25_728 * 12
    with patch("shutil.disk_usage", lambda folder: SimpleNamespace(free=4 * one)):
        assert train.main(flags(options)) == 2
        said = capsys.readouterr()
        assert "the adapter with 7 checkpoints of 0.00 GiB will take" in said.err
        assert "set or lower save_total_limit" in said.err
        assert "loaded" not in said.out
        limited = options | {"save_total_limit": 2, "max_steps": 3, "overwrite_output_dir": True}
        assert train.main(flags(limited)) == 0


def test_the_manifest_is_json_and_holds_the_options(alone):
    content = json.loads((alone.folder / f"checkpoint-{SAVED}" / MANIFEST).read_text())["manifest"]
    assert content["step"] == SAVED
    assert content["options"]["lora_rank"] == 8
    assert set(content["state"]) >= {"schedule", "loss_scale", "best"}
