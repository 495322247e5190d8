"""bitsandbytes' AdamW against PyTorch's: in 32 bits the same formula, in 8 nearly the same path; the bytes promised.

On a GPU where there is one (unified memory and all), else by bitsandbytes' own code for the CPU.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from fsdp_qlora.config.options import OPTIONS, TrainingOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.optim.optimizers import OPTIMIZERS, check_optimizer, make_optimizer, state_bytes
from fsdp_qlora.optim.schedules import SCHEDULES, make_schedule
from tests.support import tiny
from tests.support.runs import Run, run_alone, run_ranks
from tests.support.truth import DEVICE

COUNT = 200_704  # of a slice's values: enough to be paged, and quarters of whole blocks of 256
STEPS = 20
LR, DECAY = 1e-3, 0.1
PAGED = ("paged_adamw", "paged_adamw_8bit")


def trained(optimizer: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, torch.optim.Optimizer]:
    """A slice after 20 steps under a schedule with warm-up, and its optimizer.

    A quarter of it never has a gradient, as padding; a quarter has none at first, as lora_A while lora_B is zero; the
    rest has gradients of all sizes from far below eps to 1, of like size in each block of 8-bit state."""
    draw = torch.Generator().manual_seed(0)
    parameter = nn.Parameter((torch.randn(COUNT, generator=draw) * 0.02).to(DEVICE, dtype))
    options = TrainingOptions(optimizer=optimizer, lr=LR, wd=DECAY, warmup_ratio=0.2)
    chosen = make_optimizer(options, [parameter], DEVICE)
    schedule = make_schedule(options, chosen, STEPS)
    sizes = torch.logspace(-13, 0, COUNT)
    for step in range(STEPS):
        gradient = (torch.randn(COUNT, generator=draw) + 0.3) * sizes
        gradient[: COUNT // 4] = 0
        if step < 4:
            gradient[COUNT // 4 : COUNT // 2] = 0
        parameter.grad = gradient.to(DEVICE, dtype)
        chosen.step()
        schedule.step()
    assert chosen.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12), "the schedule reached its end"
    return parameter.detach().cpu().double(), chosen


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """In float64, by PyTorch, and from the same float32 values and gradients."""
    return trained("adamw", torch.float64)[0]


@pytest.fixture(scope="module")
def moved(truth) -> Tensor:
    """How far each value went."""
    draw = torch.Generator().manual_seed(0)
    return truth - (torch.randn(COUNT, generator=draw) * 0.02).double()


def test_paged_adamw_is_adamw(truth, moved):
    """eps is added to the root of the corrected second moment, decay is decoupled. bitsandbytes may decay after the
    update and not before it, which differs by lr * wd of an update."""
    plain, ours = trained("adamw")[0], trained("paged_adamw")[0]
    allowed = 4 * float((plain - truth).abs().max()) + LR * DECAY * float(moved.abs().max())
    assert float((ours - truth).abs().max()) <= allowed
    assert float(moved.abs().max()) > 1000 * allowed, "eps, decay or schedule could hide in what is allowed"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_adamw_in_8_bits_goes_nearly_the_same_way(optimizer, truth, moved):
    ours, _ = trained(optimizer)
    assert ours.isfinite().all()
    nothing = slice(0, COUNT // 4)  # no gradient: decay alone
    torch.testing.assert_close(ours[nothing], truth[nothing], rtol=1e-5, atol=0)
    error = float((ours - truth).norm() / moved.norm())
    assert 1e-4 < error < 0.1, error


def test_the_options_choices_are_the_tables_keys():
    assert set(OPTIMIZERS) == set(OPTIONS["optimizer"].choices)
    assert set(SCHEDULES) == set(OPTIONS["lr_scheduler"].choices)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_fused_kernels_take_their_scale_from_the_device(optimizer):
    made = make_optimizer(TrainingOptions(optimizer=optimizer), [nn.Parameter(torch.zeros(9, device=DEVICE))], DEVICE)
    assert OPTIMIZERS[optimizer].takes_device_scale(DEVICE) == bool(made.defaults.get("fused"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIONS["optimizer"].choices)
def test_state_takes_the_bytes_that_are_planned(optimizer):
    _, chosen = trained(optimizer)
    (state,) = chosen.state.values() if chosen.state else ({},)
    tensors = [v for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 1 and not k.startswith("qmap")]
    here = [t for t in tensors if not getattr(t, "is_paged", False)]
    counted = sum(t.numel() * t.element_size() for t in here) / COUNT
    assert counted == pytest.approx(state_bytes(optimizer, DEVICE.type), rel=1e-3)
    everywhere = sum(t.numel() * t.element_size() for t in tensors) / COUNT
    assert everywhere == pytest.approx(state_bytes(optimizer.removeprefix("paged_"), DEVICE.type), rel=1e-3)
    assert (len(here) < len(tensors)) == (optimizer in PAGED and DEVICE.type == "cuda")
    assert all(t.device.type == DEVICE.type for t in here)


def test_state_bytes_of_a_gpu():
    eighth = 2 + 8 / 256
    expected = {"adamw": 8, "fused_adam": 8, "adadelta": 8, "sgd": 0, "adamw_8bit": eighth}
    expected |= {"paged_adamw": 0, "paged_adamw_8bit": 8 / 256}
    assert {name: state_bytes(name) for name in expected} == expected


@pytest.mark.parametrize("optimizer", ["adamw_8bit", *PAGED])
def test_it_is_tried_before_anything_is_loaded(optimizer, monkeypatch):
    options = TrainingOptions(optimizer=optimizer)
    check_optimizer(options, DEVICE)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    with pytest.raises(UserError) as caught:
        check_optimizer(options, DEVICE)
    assert str(caught.value).startswith(f"optimizer: {optimizer} does not run on {DEVICE.type}")
    assert "take adamw" in str(caught.value)
    assert "\n" not in str(caught.value)
    check_optimizer(TrainingOptions(optimizer="adamw"), DEVICE)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("paged_adamw_32bit", "paged_adamw"), ("adamw_bnb_8bit", "adamw_8bit"), ("paged_adamw_8bit", "paged_adamw_8bit")],
)
def test_names_from_elsewhere(written, meant):
    assert OPTIONS["optimizer"].read(written) == meant


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("optim")
    tiny.save_model(LlamaConfig(**tiny.SHAPE), folder / "model")
    rows = tiny.save_rows(folder / "rows.jsonl", 21)
    # Without decay: bitsandbytes' kernel for GPUs decays after the update, PyTorch and its code for the CPU before it.
    # Of AdamW itself that changes these losses by 1.5e-4 at wd 0.1, more than anything else that is looked for.
    more = {"precision": "fp32", "lora_rank": 32, "lr": 5e-3, "wd": 0.0, "context_length": 64, "num_epochs": 4}
    return more | {"model_name": folder / "model", "dataset": rows, "max_steps": STEPS, "warmup_ratio": 0.1}


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory) -> dict[str, Run]:
    """The same 20 steps on two ranks with each."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs, or none")
    cases = {name: options | {"optimizer": name, "batch_size": 2} for name in ("adamw", "adamw_8bit", *PAGED)}
    return run_ranks(cases, 2, tmp_path_factory.mktemp("runs"))


def test_losses_are_adamws(runs):
    exact = runs["adamw"]
    assert exact.losses[-1] < exact.losses[0] - 0.5
    assert all([r["lr"] for r in run.records] == [r["lr"] for r in exact.records] for run in runs.values())
    # The same formula; updates that are off by 1e-4 of themselves change these losses by 3e-6 at most (tried).
    assert runs["paged_adamw"].losses == pytest.approx(exact.losses, rel=1e-5)
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        assert runs[name].losses != exact.losses
        assert runs[name].losses == pytest.approx(exact.losses, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is something to page from")
def test_paging_without_a_gpu_is_told_once(options, tmp_path, capfd):
    run_alone(options | {"optimizer": "paged_adamw_8bit", "max_steps": 2}, tmp_path / "out")
    out, err = capfd.readouterr()
    assert (out + err).count("optimizer paged_adamw_8bit: without a GPU nothing is paged") == 1
    assert "Falling back" not in out + err, "bitsandbytes says it too"


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_schedule_is_that_of_transformers(kind, warmup_ratio):
    from transformers import get_scheduler

    for steps in (1, 7, 100):
        ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4) for _ in range(2))
        options = TrainingOptions(lr=3e-4, lr_scheduler=kind, warmup_ratio=warmup_ratio)
        warm_up = 0 if kind == "constant" else round(warmup_ratio * steps)
        schedules = [make_schedule(options, ours, steps), get_scheduler(kind, theirs, warm_up, steps)]
        for _ in range(steps + 1):
            assert schedules[0].get_last_lr() == pytest.approx(schedules[1].get_last_lr(), rel=1e-12, abs=1e-18)
            for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
                optimizer.step()
                schedule.step()


@pytest.mark.slow
def test_a_run_that_needs_no_bitsandbytes_or_peft_imports_neither():
    command = "import sys, fsdp_qlora.run; print(sorted({'peft', 'bitsandbytes'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
