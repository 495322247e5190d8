"""Calibration: its cache, that ranks agree, and what of its measuring runs without a GPU."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.distributed.world import World
from fsdp_qlora.kernels.attention import Masking
from fsdp_qlora.kernels.attention_on_meta import keys_seen
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.fused.fuse import Fusion
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.plan.calibrate import attention, launches, measure, timing
from fsdp_qlora.plan.calibrate import rates as calibrating
from fsdp_qlora.plan.calibrate.attention import Form, forms_of
from fsdp_qlora.plan.calibrate.rates import NAMES, cache_file, calibrate, key_of, read, slowest, write
from fsdp_qlora.plan.inputs import facts_of
from fsdp_qlora.plan.rates import Rates
from tests.plan.test_plan_memory import SHAPE
from tests.support.known_runs import H200, facts
from tests.support.metered import META, WORLD, planned

CPU = torch.device("cpu")


def test_rates_come_back_from_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "rates.json"
    assert read(file) is None
    write(file, H200)
    assert read(file) == H200
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        json.dumps({"matmul_forward": 1.0}),
        json.dumps(dataclasses.asdict(H200) | {"copy": "fast"}),
        json.dumps(dataclasses.asdict(H200) | {"h2d": 0.0}),
    ],
)
def test_a_damaged_cache_is_as_none(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(damage)
    assert read(file) is None
    file.write_bytes(b"\xff\xfe\x00")
    assert read(file) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    write(tmp_path / "taken" / "rates.json", H200)


@pytest.mark.parametrize("error", [RuntimeError("Could not determine home directory."), None])
def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """A container's user may have neither $HOME nor an entry in passwd, or root's $HOME."""

    def home() -> Path:
        if error is not None:
            raise error
        return Path("/" + "n" * 300)  # for the superuser too this cannot be looked at: the name is too long

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    file = cache_file({"card": "any"})
    assert file is None
    write(file, H200)
    assert read(file) is None


def test_the_slowest_rank_decides() -> None:
    slow = dataclasses.replace(H200, h2d=H200.h2d / 2, crowding=2.0, launch=1e-3)
    rows = [[getattr(rates, name) for name in NAMES] for rates in (H200, slow)]
    assert slowest(rows) == slowest(rows[::-1]) == slow


def test_without_a_gpu_there_are_no_rates() -> None:
    model, config, fusion = planned(LlamaConfig(**SHAPE), context_length=128, lora_rank=8)
    world = dataclasses.replace(WORLD, device=CPU)
    assert calibrate(facts_of(model, config, WORLD, fusion, 8), model, world) is None


def a_card(monkeypatch: pytest.MonkeyPatch, uuid: str = "first") -> None:
    card = SimpleNamespace(name="a card", uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)


class _Ranks(World):
    """Two ranks of which the other has the rates that it is given."""

    def gather(self, numbers: Any) -> list[list[float]]:
        return [list(numbers), list(numbers)]


def test_it_is_measured_once_for_a_card_and_a_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    a_card(monkeypatch)
    measured: list[int] = []
    monkeypatch.setattr(calibrating, "_measure", lambda *_: measured.append(1) or H200)
    world = _Ranks(0, 2, 0, 2, torch.device("cuda"))
    known = facts("llama3_8b", 4, 2048, 16, ranks=2)
    model = planned(LlamaConfig(**SHAPE), context_length=128)[0]
    assert calibrate(known, model, world) == calibrate(known, model, world) == H200
    assert len(measured) == 1
    assert (tmp_path / "fsdp_qlora").is_dir()
    calibrate(dataclasses.replace(known, context=512), model, world)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    calibrate(known, model, world)
    assert len(measured) == 3
    cache_file(key_of(known, model, world)).write_text("damaged")
    assert calibrate(known, model, world) == H200
    assert len(measured) == 4


def test_what_is_kept_is_what_the_slowest_rank_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cards in slots of unequal speed: the second start must plan with the rates of the first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    a_card(monkeypatch)
    monkeypatch.setattr(calibrating, "_measure", lambda *_: H200)
    place = list(dataclasses.asdict(H200)).index("h2d")

    class SlowSlot(_Ranks):
        def gather(self, numbers: Any) -> list[list[float]]:
            theirs = list(numbers)
            if len(theirs) > 1:
                theirs[place] = min(theirs[place], 6e9)
            return [list(numbers), theirs]

    known, model = facts("llama3_8b", 4, 2048, 16, ranks=2), planned(LlamaConfig(**SHAPE), context_length=128)[0]
    first = calibrate(known, model, SlowSlot(0, 2, 0, 2, torch.device("cuda")))
    again = calibrate(known, model, _Ranks(0, 2, 0, 2, torch.device("cuda")))  # each rank reads the file alone
    assert first is not None
    assert first.h2d == 6e9
    assert again == first


# ---- the measuring itself: on the CPU with a clock in place of CUDA's events, to see that it runs


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> None:
    def events(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(min(repeats, 2)):
            call()
        return max(time.perf_counter() - start, 1e-9) / min(repeats, 2)

    monkeypatch.setattr(timing, "events", events)
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(measure, "COPIED", 1 << 20)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


def test_what_is_measured_on_one_card_runs(clocked: None, one_thread: None) -> None:
    model, config, fusion = planned(
        LlamaConfig(**SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}),
        batch_size=1,
        context_length=64,
        lora_rank=8,
    )
    known = dataclasses.replace(facts_of(model, config, WORLD, fusion, 8), attention="cpu")
    for block in model.blocks.values():
        assert isinstance(block.fused, FusedBlock)
        block.fused = dataclasses.replace(block.fused, backend="cpu")
    dtype = model.precision.compute
    found = measure.products(known, dtype, CPU) | attention.attention(known, {Form(Masking(0.1), "cpu"): 2}, dtype, CPU)
    found |= measure.memory(model, CPU) | measure.collectives(known, dtype, dataclasses.replace(WORLD, device=CPU))
    found["launch"] = launches.launches(model, known, CPU)
    link = {"h2d", "h2d_both", "d2h_both"}
    assert found.keys() == set(NAMES) - link
    assert all(value > 0 for name, value in found.items() if name not in ("gather", "reduce"))
    assert all(p.device == META for p in model.parameters()), "the model itself is left as it was"


def test_attention_is_measured_as_micro_batches_come(clocked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one length are a batch: one after the other they took twice as long on an H200."""
    model, config, fusion = planned(LlamaConfig(**SHAPE), batch_size=4, context_length=64, lora_rank=8)
    computed: list[tuple[tuple[int, ...], bool]] = []
    attend = attention.attend

    def watched(q: torch.Tensor, *given: Any) -> Any:
        computed.append((tuple(q.shape[:2]), given[-1] is not None))
        return attend(q, *given)

    monkeypatch.setattr(attention, "attend", watched)
    monkeypatch.setattr(attention, "MOST_TOKENS", 250)
    for lengths, shape, flat in (
        ([64] * 8, (3, 64), False),
        ([40, 60] * 4, (1, 200), True),
        ([120, 200] * 4, (1, 160), True),  # of which one is all that is measured: still as a document
    ):
        rows = RowLengths(np.array(lengths), 200, 1.0)
        known = facts_of(model, config, WORLD, fusion, 8, lengths=rows)
        attention.attention(known, {Form(Masking(0.1), "cpu"): 1}, torch.float32, CPU)
        assert set(computed) == {(shape, flat)}
        computed.clear()


def in_windows(window: int | None, **options: Any) -> tuple[CausalModel, Any, Fusion]:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    hf = Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": window})
    return planned(hf, batch_size=2, context_length=128, lora_rank=8, **options)


def test_attention_is_measured_as_each_block_computes_it(clocked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of the first block's window were taken for the blocks that see all keys, which take most of the time."""
    model, config, fusion = in_windows(16)
    known = facts_of(model, config, WORLD, fusion, 8)
    scale = model.fused_blocks[0].spec.attention.masking.scale
    forms = forms_of(model, known, CPU)
    assert forms == {Form(Masking(scale, 16), "cudnn"): 2, Form(Masking(scale), "cudnn"): 1}
    monkeypatch.setattr(attention, "_rates", lambda facts, form, *_: (1.0, 10.0) if form.masking.window else (4.0, 8.0))
    found = attention.attention(known, forms, torch.float32, CPU)
    windowed, whole = 2 * keys_seen(128, 16), keys_seen(128, None)
    assert found["attention_forward"] == pytest.approx((windowed + whole) / (windowed / 1 + whole / 4))
    assert found["attention_backward"] == pytest.approx((windowed + whole) / (windowed / 10 + whole / 8))


def test_documents_are_measured_by_what_computes_them() -> None:
    model, config, fusion = in_windows(16)
    known = facts_of(model, config, WORLD, fusion, 8, lengths=RowLengths(np.array([40, 50, 60] * 4), 64, 1.0))
    assert {form.backend for form in forms_of(model, known, torch.device("cuda"))} == {"flash"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generic_attention_is_measured_as_transformers_computes_it(clocked: None, implementation: str) -> None:
    model, config, fusion = in_windows(16, fused="false")
    model.backbone.config._attn_implementation = implementation
    known = facts_of(model, config, WORLD, fusion, 8)
    assert known.keys_per_query == pytest.approx((2 * keys_seen(128, 16) + keys_seen(128, None)) / 3)
    forms = forms_of(model, known, CPU)
    assert forms == {Form(Masking(1.0, 16), implementation): 2, Form(Masking(1.0), implementation): 1}
    assert all(rate > 0 for rate in attention.attention(known, forms, torch.float32, CPU).values())


def test_other_rates_are_looked_for_where_what_is_measured_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window, the dtype of products, and the card: of two alike one may be in a slot of four lanes."""
    a_card(monkeypatch)

    def key(model: CausalModel, **changes: Any) -> str:
        return json.dumps(key_of(dataclasses.replace(facts("llama3_8b", 4, 2048, 16), **changes), model, WORLD))

    model = in_windows(16)[0]
    keys = [key(model), key(in_windows(32)[0]), key(in_windows(16, fused="false")[0])]
    keys += [
        key(model, flat=True),
        key(model, multiprocessors=132),
        key(model, adapter="dora"),
        key(model, dropout=0.1),
    ]
    a_card(monkeypatch, "second")
    keys.append(key(model))
    model.precision = Precision(torch.float16, torch.float16)
    keys.append(key(model))
    assert len(set(keys)) == len(keys)


@pytest.mark.gpu
def test_rates_of_this_gpu_are_those_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda", 0)

    class Alone(World):
        def gather(self, numbers: Any) -> list[list[float]]:
            return [list(numbers)]

        def barrier(self) -> None:
            pass

    model, config, fusion = planned(LlamaConfig(**SHAPE), batch_size=1, context_length=512, lora_rank=8)
    world = Alone(0, 1, 0, 1, device)
    known = dataclasses.replace(facts_of(model, config, world, fusion, 8), attention="flash")
    for block in model.blocks.values():
        assert isinstance(block.fused, FusedBlock)
        block.fused = dataclasses.replace(block.fused, backend="flash")
    rates = calibrate(known, model, world)
    assert isinstance(rates, Rates)
    assert 1e12 < rates.matmul_forward < 1e16
    assert 1e10 < rates.dequantize < 2 * rates.copy < 1e14
    assert 1e9 < rates.h2d_both <= rates.h2d < 1e12
    assert 1e-6 < rates.launch < 1e-3
    before = torch.cuda.memory_allocated()
    assert calibrate(known, model, world) == rates
    assert torch.cuda.memory_allocated() == before
