"""Placed memory: tensors that live at the same time never share a byte, and a run with an arena is a run without."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen3Config

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels import device
from fsdp_qlora.memory.arena import Arena, Recorder
from fsdp_qlora.memory.arena_layout import ALIGN, Life, Schedule, most_alive, place
from fsdp_qlora.training import retry
from tests.support import tiny
from tests.support.runs import Options, flags, run_alone
from tests.support.torchrun import run_torchrun

CPU, BF16 = torch.device("cpu"), torch.bfloat16
FAMILIES = {
    "llama": LlamaConfig(**tiny.SHAPE),
    "head norms": Qwen3Config(**tiny.SHAPE, head_dim=16),
    "four norms": Gemma2Config(**tiny.SHAPE, head_dim=16, attn_logit_softcapping=None),
}


@pytest.fixture(autouse=True)
def _given_back() -> Iterator[None]:
    yield
    device.take_from(None)


def lives_at_random(count: int, seed: int) -> list[Life]:
    draw = random.Random(seed)
    return [
        Life(i, min(count, i + draw.choice([1, 2, 5, 50, count])), draw.choice([0, 100, 512, 4096, 70000]), 1, BF16)
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_what_lives_at_the_same_time_shares_no_byte(seed: int) -> None:
    lives = lives_at_random(120, seed)
    schedule = place(lives)
    spans = [(o, o + -(-life.nbytes // ALIGN) * ALIGN) for o, life in zip(schedule.offsets, lives, strict=True)]
    for i, (a, one) in enumerate(zip(lives, spans, strict=True)):
        assert one[0] % ALIGN == 0
        assert one[1] <= schedule.nbytes
        for b, other in zip(lives[i + 1 :], spans[i + 1 :], strict=True):
            if a.birth < b.death and b.birth < a.death:
                assert one[1] <= other[0] or other[1] <= one[0]
    assert most_alive(lives) <= schedule.nbytes <= 1.25 * most_alive(lives)


def test_nothing_takes_nothing() -> None:
    assert place([]).nbytes == most_alive([]) == 0


def test_a_recorder_notes_when_tensors_are_gone() -> None:
    recorder, meta = Recorder(), torch.device("meta")
    first = recorder((4, 8), BF16, meta)
    view = first[:, :3]
    del first
    second = recorder((16,), torch.float32, meta)
    del view
    third = recorder((2, 2), BF16, meta)
    assert recorder.lives() == [
        Life(0, 2, 64, 8, BF16), Life(1, 3, 64, 16, torch.float32), Life(2, 3, 8, 2, BF16)
    ]  # fmt: skip
    del second, third


def test_an_arena_gives_the_places_in_turn_and_smaller_tensors_in_them() -> None:
    lives = [Life(0, 2, 64, 8, BF16), Life(1, 2, 64, 16, torch.float32)]
    arena = Arena(place(lives), CPU)
    for rows in (4, 3):
        arena.start()
        one, two = device.empty((rows, 8), torch.empty(0, dtype=BF16)), device.empty((16,), torch.empty(0))
        assert {one.untyped_storage().data_ptr(), two.untyped_storage().data_ptr()} == {arena.address}
        assert abs(one.data_ptr() - two.data_ptr()) == ALIGN
        assert one.shape == (rows, 8)
        assert one.is_contiguous()
        assert one._base is None
    arena.stop()
    assert device.empty((16,), torch.empty(0)).untyped_storage().data_ptr() != arena.address
    assert not arena.strayed


@pytest.mark.parametrize("asked", [((5, 8), BF16), ((4, 9), BF16), ((4, 8), torch.float32)])
def test_other_tensors_than_planned_get_memory_of_their_own(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the rest of that micro-batch do: when they die is not known."""
    arena = Arena(place([Life(0, 2, 64, 8, BF16), Life(1, 2, 64, 8, BF16)]), CPU)
    for _ in range(2):
        arena.start()
        given = [arena(*asked, CPU), arena((4, 8), BF16, CPU)]
        assert all(t.untyped_storage().data_ptr() != arena.address for t in given)
        arena.start()
        assert arena((4, 8), BF16, CPU).untyped_storage().data_ptr() == arena.address
    assert capsys.readouterr().out.count("was not planned") == 1


def options(folder: Path, family: str, more: Options) -> Options:
    return {
        "model_name": folder / family, "dataset": folder / "rows.jsonl", "context_length": 64, "batch_size": 3,
        "max_steps": 3, "lora_rank": 4, "lr": 0.01, "train_type": "qlora", "fused": "true", "log_to": "stdout",
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arena")
    for family, config in FAMILIES.items():
        tiny.save_model(config, folder / family)
    tiny.save_rows(folder / "rows.jsonl", 24)
    return folder


CASES: dict[str, tuple[str, Options]] = {
    **{f"llama, {keep.label}": ("llama", {"keep_activations": keep.label}) for keep in Keep},
    **{f"llama, {keep} in host memory": ("llama", {"keep_activations": keep, "use_activation_cpu_offload": True})
       for keep in ("input", "all")},
    "head norms, bf16": ("head norms", {"precision": "bf16", "keep_activations": "qkv"}),
    "four norms": ("four norms", {"keep_activations": "attention"}),
    "dropout": ("llama", {"lora_dropout": 0.1}),
    "micro-batches": ("llama", {"gradient_accumulation_steps": 2}),
    "micro-batches summed up first": ("llama", {"gradient_accumulation_steps": 2, "no_sync": True}),
    "sums in bf16": ("llama", {"reduce_dtype": "bf16"}),
    "no update ahead": ("llama", {"optimizer": "sgd"}),
    "packed": ("llama", {"packing": True, "keep_activations": "qkv"}),
    "dora": ("llama", {"train_type": "bnb_dora"}),
    "dora, all, micro-batches": (
        "llama", {"train_type": "bnb_dora", "keep_activations": "all", "gradient_accumulation_steps": 2}
    ),
    "dora, four norms, in host memory": (
        "four norms",
        {"train_type": "bnb_dora", "keep_activations": "qkv", "use_activation_cpu_offload": True, "lora_rank": 72},
    ),
    "queries and values": ("llama", {"lora_target_modules": "q_proj,v_proj"}),
}  # fmt: skip


QUICK = {f"llama, {keep.label}" for keep in (Keep.INPUT, Keep.ALL)} | {"packed"}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_a_run_in_an_arena_is_the_run_without(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit, in rows of unequal lengths."""
    family, more = CASES[name]
    made: list[Arena] = []
    make = retry.make_arena

    def noted(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(retry, "make_arena", noted)
    inside = run_alone(options(folder, family, more), tmp_path / "inside")
    monkeypatch.setattr(retry, "make_arena", lambda *_: None)
    outside = run_alone(options(folder, family, more), tmp_path / "outside")
    assert made[0].nbytes > 0
    assert not made[0].strayed, capsys.readouterr().out
    assert inside.losses == outside.losses
    for key, value in outside.tensors.items():
        assert torch.equal(inside.tensors[key], value), key


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["llama, all", "head norms, bf16", "four norms", "packed", "dropout", "dora"])
def test_an_evaluation_lies_in_the_arena_of_a_step(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family, more = CASES[name]
    case = options(folder, family, more | {"eval_samples": 7, "eval_steps": 1})
    lent: list[Arena | None] = []
    lend = Arena.lend

    def noted(arena: Arena, schedule: Schedule) -> Arena | None:
        lent.append(lend(arena, schedule))
        return lent[-1]

    monkeypatch.setattr(Arena, "lend", noted)
    inside = run_alone(case, tmp_path / "inside")
    assert len(lent) == len(inside.evaluations) == len(inside.losses)
    for arena in lent:
        assert arena is not None
        assert not arena.strayed, capsys.readouterr().out
    monkeypatch.setattr(Arena, "lend", lambda *_: None)
    outside = run_alone(case, tmp_path / "outside")
    assert [e["eval_loss"] for e in inside.evaluations] == [e["eval_loss"] for e in outside.evaluations]
    assert inside.losses == outside.losses


PLANNED_OTHERWISE = """
    import sys
    from fsdp_qlora.plan import planning
    from train import main

    planning.through_host = lambda *_: True  # what the machine promises, and the exchange then refuses
    sys.stdout.write(f"ended with {main(sys.argv[1:])}\\n")
    """


def test_the_arena_is_of_the_exchange_that_came_to_be(folder: Path, tmp_path: Path) -> None:
    """Copies through host memory were planned for, whose gradients are narrower than those that NCCL sums."""
    case = options(folder, "llama", {"output_dir": tmp_path / "out", "precision": "bf16"})
    done = run_torchrun(PLANNED_OTHERWISE, 2, flags(case))
    assert done.stdout.count("ended with 0") == 2, f"{done.stdout}\n{done.stderr}"
    assert "was not planned" not in done.stdout, done.stdout
