"""`--deterministic true`: where it is refused, what it sets before and in PyTorch, and which kernels are left then."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import train
from benchmarks.bits import agreement, told
from fsdp_qlora.config.parse import parse
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels import attention
from fsdp_qlora.kernels.attention import Masking, attend, attend_backward, fastest, possible
from fsdp_qlora.kernels.device import deterministic
from fsdp_qlora.plan.costs import block_costs
from fsdp_qlora.plan.inputs import workspace
from fsdp_qlora.runtime import launcher as environment
from fsdp_qlora.runtime.determinism import deterministic_algorithms
from tests.support import tiny
from tests.support.known_runs import facts
from tests.support.torchrun import ROOT

GPU, BF16, PLAIN = torch.device("cuda"), torch.bfloat16, Masking(1.0)
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def strict() -> Iterator[None]:
    with deterministic_algorithms(True):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    LlamaConfig(**tiny.SHAPE | {"max_position_embeddings": 512}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- the option


def test_it_is_off_unless_asked_for() -> None:
    assert parse(["--model_name", "m"]).training.deterministic is False
    assert parse(["--model_name", "m", "--deterministic"]).training.deterministic is True


def test_a_micro_batch_that_measuring_decides_is_refused() -> None:
    with pytest.raises(UserError, match=r"^.*--deterministic true.*--batch_size -1.*set batch_size$") as refused:
        parse(["--model_name", "m", "--deterministic", "true", "--batch_size", "-1"])
    assert len(str(refused.value).splitlines()) == 1
    parse(["--model_name", "m", "--batch_size", "-1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it has its effect")
def test_without_a_gpu_it_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model_name", str(model), "--dummy_weights", "true", "--dataset", "dummy", "--deterministic", "true"]
    assert train.main([*asked, "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("train.py: deterministic: true has no effect without a GPU")
    assert "--plan_only true --plan_for 2x4090" in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not deterministic(), "another run in this process would pay for it"


@pytest.mark.parametrize(("asked", "card", "backend"), [("false", "H100", "cudnn"), ("true", "H100", "flash")])
def test_a_rig_that_is_elsewhere_is_planned_with_the_attention_it_would_take(
    model: Path, capsys: pytest.CaptureFixture[str], asked: str, card: str, backend: str
) -> None:
    rig = ["--plan_only", "true", "--plan_for", f"1x{card}", "--deterministic", asked]
    assert train.main(["--model_name", str(model), *rig]) == 0
    assert f"attention by {backend}" in capsys.readouterr().out
    assert not deterministic()


# ---- before PyTorch is there

WATCH = """
    import os, sys
    class Watch:
        def find_spec(self, name, *_):
            if name == "torch":
                print([os.environ.get(name) for name in {names}], flush=True)
                os._exit(0)
    sys.meta_path.insert(0, Watch())
    import train
    sys.exit(train.main(sys.argv[1:]))
"""


def started(model: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """train.py up to where PyTorch is first imported."""
    code = "\n".join(line.removeprefix("    ") for line in WATCH.format(names=VARIABLES).splitlines())
    command = [sys.executable, "-c", code, "--model_name", str(model), "--dataset", "dummy", *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_libraries_are_told_before_pytorch_is_imported(model: Path) -> None:
    assert started(model).stdout == "[None, None]\n"
    assert started(model, "--deterministic", "true").stdout == "[':4096:8', '1']\n"
    small = started(model, "--deterministic", "true", CUBLAS_WORKSPACE_CONFIG=":16:8")
    assert small.stdout == "[':16:8', '1']\n"
    wrong = started(model, "--deterministic", "true", CUBLAS_WORKSPACE_CONFIG=":1024:2")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("train.py: deterministic: true needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8")
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("told", "nbytes"), [(None, None), (":4096:8", 32 << 20), (":16:8", 128 << 10), (":4096:2:16:8", 8320 << 10)]
)
def test_the_plan_counts_the_workspaces_that_are_set(
    told: str | None, nbytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", told)
    assert environment.cublas_workspace_bytes() == nbytes
    assert workspace(GPU, (8, 9)) == (nbytes or 8320 << 10)
    assert workspace(torch.device("cpu")) == 0


# ---- in PyTorch


def test_inside_pytorch_is_strict_and_writes_no_memory_and_outside_all_is_as_before() -> None:
    def state() -> tuple[bool, ...]:
        memory: Any = torch.utils.deterministic
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns, memory.fill_uninitialized_memory

    before = state()
    with deterministic_algorithms(False):
        assert state() == before

    def fail() -> None:
        with deterministic_algorithms(True):
            assert state() == (True, False, False)
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert state() == before


# ---- attention


def test_only_deterministic_backends_are_possible(strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    packages: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    assert possible(GPU, BF16, 512, 128, PLAIN) == ["flash", "math"]
    assert possible(GPU, torch.float32, 512, 128, PLAIN) == ["math"]
    assert possible(torch.device("cpu"), BF16, 512, 128, PLAIN) == ["cpu", "math"]
    packages.add("flash_attn")
    assert possible(GPU, BF16, 512, 128, PLAIN) == ["flash", "flash_attn", "math"]
    assert possible(GPU, BF16, 512, 128, Masking(1.0, softcap=50.0)) == ["flash_attn", "math"]


def test_the_choice_does_not_hang_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which cuDNN is fastest, and the flash-attn package faster than PyTorch's own."""
    shape, milliseconds = (1, 512, 8, 2, 64), {"cudnn": 1.0, "flash_attn": 2.0, "flash": 3.0}
    fails: set[str] = set()
    real = {name: getattr(torch, name) for name in ("randn",)}

    def timed(*arguments: Any) -> float:
        if arguments[-1] in fails:
            raise RuntimeError("not on this card")
        return milliseconds[arguments[-1]]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(attention, "_time", timed)
    monkeypatch.setattr(attention.torch, "randn", lambda *size, device, dtype: real["randn"](*size, dtype=dtype))
    attention._chosen.cache_clear()
    assert fastest(GPU, BF16, shape, PLAIN) == "cudnn"
    with deterministic_algorithms(True):
        assert fastest(GPU, BF16, shape, PLAIN) == "flash", "not what was found before"
        attention._chosen.cache_clear()
        fails.add("flash")
        assert fastest(GPU, BF16, shape, PLAIN) == "flash_attn"
        attention._chosen.cache_clear()
        fails.add("flash_attn")
        assert fastest(GPU, BF16, shape, PLAIN) == "math"
    attention._chosen.cache_clear()


def test_the_flash_attn_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool, **_: object) -> Tensor:
        told.append(deterministic)
        return q + k + v

    package: Any = type(sys)("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = torch.ones(3, 1, 4, 2, 8)
    attend(q, k, v, PLAIN, "flash_attn")
    with deterministic_algorithms(True):
        attend(q, k, v, PLAIN, "flash_attn")
    assert told == [False, True]


@pytest.mark.gpu
def test_flash_attention_repeats_its_bits(strict: None) -> None:
    q, d_out = (torch.randn(1, 4096, 8, 128, device=GPU, dtype=BF16) for _ in range(2))
    k, v = (torch.randn(1, 4096, 2, 128, device=GPU, dtype=BF16) for _ in range(2))
    out, stats = attend(q, k, v, PLAIN, "flash")
    first = attend_backward(d_out, q, k, v, out, stats, PLAIN, "flash")
    for _ in range(10):
        again = attend_backward(d_out, q, k, v, out, stats, PLAIN, "flash")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("heads", "parts"), [(32, 5), (64, 3), (132, 1)])
def test_the_plan_counts_a_sum_for_each_part_of_the_keys(heads: int, parts: int) -> None:
    """An H100's 132 multiprocessors, one row; each sum has rows beside those of up to eight documents."""
    known = replace(facts("llama3_8b", 1, 4096, 16), attention="flash", heads=heads, kv_heads=heads)
    plain, apart = (block_costs(replace(known, multiprocessors=n))["all", False] for n in (0, 132))
    whole = (known.tokens + 8 * 128) * known.queries * 4
    assert apart.loose - plain.loose == (parts - 1) * whole
    other = replace(known, attention="cudnn", multiprocessors=132)
    assert block_costs(other) == block_costs(replace(other, multiprocessors=0))


# ---- the benchmark's words


def test_agreement_is_told_to_the_bit() -> None:
    near = 10.0 + 2e-15
    assert near != 10.0
    assert agreement([10.0, 9.5], [10.0, 9.5]) == "all 2 losses agree to the last bit"
    assert (
        agreement([10.0, 10.0, 9.5], [10.0, near, 9.0])
        == "1 of 3 losses agree; apart from step 2 on, by at most 5.0e-01"
    )
    rows = [
        {"host_memory_gib": host, "losses": [loss], "seconds_per_step": 0.3, "plan": {"facts": {"attention": "flash"}}}
        for host, loss in (("7", 10.0), ("7", 10.0), ("12", near), ("12", near))
    ]
    lines = told(rows, True)
    assert [("all 1" in line) for line in lines if "plan" in line] == [True, False, False, False, False, True]
    assert lines[1].startswith("  7 GiB run 1: 0.3000 s a step, attention by flash")
