"""What is kept between starts: the same plans with it and without, and nothing from another program or a bad file."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.config.options import Config
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan import costs, layouts, remembered
from fsdp_qlora.plan import plan as plans
from fsdp_qlora.plan.candidate import BlockPlan
from fsdp_qlora.plan.inputs import KEEP
from fsdp_qlora.plan.layouts import Layouts
from fsdp_qlora.plan.plan import Budget, Plan, Wishes, make_plan
from fsdp_qlora.plan.remembered import program_of, remembering
from fsdp_qlora.plan.search import Search
from fsdp_qlora.plan.shape_key import model_key, options_key
from fsdp_qlora.units import GIB
from tests.plan.test_plan_memory import SHAPE, SMALL
from tests.support.known_runs import H200, facts
from tests.support.metered import WORLD, planned

LARGE = facts("llama3_8b", 4, 1024, 16)
TIGHT = Budget(10 * GIB, 12 * GIB)
Counted = Callable[[str, Any], int]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(remembered, "program", lambda: "this")
    return tmp_path / "fsdp_qlora"


@pytest.fixture
def counted() -> Counted:
    """Ask for a value, and return how many times one was made."""
    made = []

    def ask(kind: str, key: Any) -> int:
        value = remembered.remembered(kind, lambda: key, lambda: made.append(key) or {"is": [key, 0.1]})
        assert value == {"is": [key, 0.1]}
        return len(made)

    return ask


def only(folder: Path) -> Path:
    (file,) = folder.glob("*")
    return file


def test_it_is_made_once_for_equal_keys_and_always_outside(counted: Counted, folder: Path) -> None:
    assert [counted("a", 1), counted("a", 1)] == [1, 2]
    assert not folder.exists()
    with remembering():
        assert [counted("a", 1), counted("a", 1), counted("a", 2), counted("b", 1), counted("b", 1)] == [3, 3, 4, 5, 5]
        with remembering(False):
            assert counted("a", 1) == 6
        assert counted("a", 1) == 6


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "binary", "folder"])
def test_a_damaged_file_is_made_anew(counted: Counted, folder: Path, damage: str) -> None:
    with remembering():
        assert counted("a", 1) == 1
        file = only(folder)
        text = file.read_bytes()
        file.unlink()
        if damage == "folder":
            file.mkdir()
        else:
            bad = {"empty": b"", "cut": text[:-1], "changed": text.replace(b"0.1", b"0.2"), "binary": b"\xff" * 99}
            assert bad[damage] != text
            file.write_bytes(bad[damage])
        assert counted("a", 1) == 2
        assert counted("a", 1) == (3 if damage == "folder" else 2)


def test_another_program_is_served_nothing(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    with remembering():
        assert counted("a", 1) == 1
        monkeypatch.setattr(remembered, "program", lambda: "another")
        assert counted("a", 1) == 2
        monkeypatch.setattr(remembered, "program", lambda: None)
        assert [counted("a", 1), counted("a", 1)] == [3, 4]


def test_bits_that_repeat_are_another_key(counted: Counted) -> None:
    with remembering():
        assert counted("a", 1) == 1
        torch.use_deterministic_algorithms(True)
        assert counted("a", 1) == 2


def test_a_program_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, kernels = tmp_path / "package", tmp_path / "kernels"
    for path in (package / "plan", kernels):
        path.mkdir(parents=True)
        (path / "one.py").write_text("x = 1\n")
    (package / "kernels").symlink_to(kernels)
    later = time.time() + 60
    first = program_of(package, later)
    assert first == program_of(package, later)
    assert program_of(package, time.time() - 60) is None  # whose process may have loaded what was there before
    (kernels / "one.py").write_text("x = 2\n")
    second = program_of(package, later)
    (package / "plan" / "one.py").rename(package / "plan" / "two.py")
    third = program_of(package, later)
    monkeypatch.setattr(remembered, "_version", lambda name: "99")
    assert len({first, second, third, program_of(package, later), None}) == 5


def test_the_oldest_are_dropped(counted: Counted, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 2)
    with remembering():
        for key in (1, 2, 1, 3):  # 1 is used again before 3 comes
            counted("a", key)
            time.sleep(0.02)
        assert len(list(folder.glob("*"))) == 2
        assert [counted("a", 1), counted("a", 3), counted("a", 2)] == [3, 3, 4]


def test_without_a_folder_it_is_made(counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with remembering():
        assert [counted("a", 1), counted("a", 1)] == [1, 2]
        monkeypatch.setattr(remembered, "user_cache", lambda: None)
        assert counted("a", 1) == 3


# ---- plans


def fresh_plan(budget: Budget = TIGHT) -> Plan:
    for found in (plans._best, plans._clock, costs._traced):
        found.cache_clear()
    return make_plan(LARGE, H200, Wishes(), budget)


def test_plans_are_the_same_with_it_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fresh_plan()
    with remembering():
        assert fresh_plan() == plain
        calls: list[str] = []
        best, trace = Search.best, costs.trace
        monkeypatch.setattr(Search, "best", lambda self: calls.append("search") or best(self))
        monkeypatch.setattr(costs, "trace", lambda *of: calls.append("trace") or trace(*of))
        assert fresh_plan() == plain
        assert not calls
        more = fresh_plan(replace(TIGHT, device_bytes=20 * GIB))
        assert set(calls) == {"search"}  # the shapes are known
    assert more.seconds is not None
    assert plain.seconds is not None
    assert more.seconds < plain.seconds
    assert more == fresh_plan(replace(TIGHT, device_bytes=20 * GIB))


def test_what_does_not_fit_is_known_too() -> None:
    with remembering():
        for _ in range(2):
            plans._best.cache_clear()
            assert plans._best(LARGE, H200, "replicate", Wishes(), Budget(GIB, GIB)) is None


# ---- layouts


def small(**options: Any) -> tuple[CausalModel, Config]:
    model, config, _ = planned(LlamaConfig(**SHAPE), **SMALL | options)
    return model, config


def layouts_of(model: CausalModel, config: Config, device: str = "cuda", widens: bool = True) -> Layouts:
    return Layouts(model, config, 256, widens, replace(WORLD, device=torch.device(device)))


def test_layouts_are_the_same_with_it_and_without(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    model, config = small()
    mixes = [[BlockPlan(True, "all", False)] * 2, [BlockPlan(False, "halves", True), BlockPlan(True, "input", False)]]
    plain = layouts_of(model, config, "cpu")
    wanted = [(plain.of(blocks), plain.offloaded(blocks)) for blocks in mixes], plain.of_forward()
    assert not folder.exists()  # where there is no GPU nothing is kept
    for start in range(2):
        if start:
            for name in ("rehearse", "rehearse_forward", "place"):
                monkeypatch.delattr(layouts, name)
        kept = layouts_of(*small())
        assert ([(kept.of(blocks), kept.offloaded(blocks)) for blocks in mixes], kept.of_forward()) == wanted
    with pytest.raises(NameError):
        layouts_of(*small()).of([BlockPlan(True, KEEP[3], False)] * 2)
    with pytest.raises(NameError):
        layouts_of(*small(), widens=False).of(mixes[0])


@pytest.mark.parametrize(
    "options",
    [{"lora_rank": 24}, {"lora_dropout": 0.1}, {"batch_size": 2}, {"train_type": "bnb_dora"}, {"no_sync": True}],
    ids=lambda options: next(iter(options)),
)
def test_another_shape_has_another_key(options: dict[str, Any]) -> None:
    accumulating = {"gradient_accumulation_steps": 2}
    keys = [
        [model_key(model), options_key(config)]
        for model, config in (small(**accumulating | o) for o in ({}, {}, options))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_another_model_has_another_key() -> None:
    one, other = (planned(LlamaConfig(**SHAPE | changed), **SMALL)[0] for changed in ({}, {"rms_norm_eps": 1e-4}))
    assert model_key(one) != model_key(other)
    assert model_key(one)[3:] != model_key(other)[3:]  # in the blocks too


def test_a_config_of_anything_has_a_key(folder: Path) -> None:
    odd = LlamaConfig(**SHAPE, odd={1: 2, "a": {3}, (1, 2): torch.float32})
    model, config, _ = planned(odd, **SMALL)
    layouts_of(model, config).of_forward()
    assert only(folder).stat().st_size > 100


def test_options_that_change_no_shape_change_no_key() -> None:
    (_, one), (_, other) = small(), small(lr=1e-3, num_epochs=3, seed=7, host_memory_gib=5.0, plan_only=True)
    assert options_key(one) == options_key(other)
