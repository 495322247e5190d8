"""The update that is queued behind backward, before the host knows the sums: the same, or none if one is not finite."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from fsdp_qlora.config.parse import parse
from fsdp_qlora.data.collate import Batch, shift_labels
from fsdp_qlora.errors import TrainingStopped
from fsdp_qlora.training.host_update import HostUpdate
from fsdp_qlora.training.step import Stepper
from tests.support import tiny
from tests.support.built import built
from tests.support.runs import flags
from tests.support.truth import DEVICE

STEPS = 4
LOOSE, TIGHT = "1e6", "1e-3"  # norms that no gradient of these reaches, and that every one does


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, str]:
    model = tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path_factory.mktemp("ahead"))
    more = {"dataset": "dummy", "lora_rank": "4", "lr": "1e-2", "warmup_ratio": "0", "optimizer": "fused_adamw"}
    return more | {"model_name": model, "max_steps": str(STEPS)}


class Stepping:
    """A model with its stepper, whose batches are `batch(step)`."""

    def __init__(self, ours, options) -> None:
        self.adapters, training = ours.adapters, parse(flags(options)).training
        self.stepper = Stepper(ours.model, ours.adapters, training, STEPS, ours.world)

    def begin(self, step: int) -> None:
        ids = torch.arange(4, 28)[None] + step
        self.stepper.begin(self.stepper.prepare([Batch(ids, *shift_labels(ids), [step], ids.numel())]))

    def step(self, step: int) -> tuple[float, float]:
        self.begin(step)
        record = self.stepper.end(0.0, 0.0)
        return record.loss, record.grad_norm

    def all(self) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
        return [self.step(step) for step in range(STEPS)], self.adapters.named_tensors()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", [None, LOOSE, TIGHT], ids=["none", "loose", "tight"])
def test_it_is_the_same_update(precision, norm, options):
    clipping = {"grad_norm": norm} if norm else {"apply_gradient_clipping": "false"}
    changes = options | clipping | {"precision": precision}
    results = []
    for ahead in (True, False):
        with built(changes) as ours:
            stepping = Stepping(ours, changes)
            stepper = stepping.stepper
            assert stepper.update.is_queued
            if not ahead:
                max_norm = float(norm) if norm else None
                stepper.update = HostUpdate(stepper.optimizer, stepper.adapters, stepper.scale, max_norm)
            results.append(stepping.all())
    (losses, adapters), (told, expected) = results
    assert losses[-1][0] < losses[0][0], "nothing was learnt"
    assert all((size > float(norm or LOOSE)) == (norm == TIGHT) for _, size in told)
    if norm != TIGHT and DEVICE.type == "cpu":  # a GPU's attention adds gradients in any order
        assert losses == told
        assert all(torch.equal(adapters[name], expected[name]) for name in expected)
    else:  # divided by a number where the other is multiplied by its inverse
        torch.testing.assert_close(losses, told, rtol=1e-5 if precision == "fp32" else 1e-3, atol=0)
        error = max(float((adapters[name] - expected[name]).norm()) for name in expected)
        assert error < 1e-3 * max(float(tensor.norm()) for tensor in expected.values())


def test_only_fused_kernels_can(options):
    for optimizer, can in {"fused_adam": True, "fused_adamw": True, "sgd": False, "adadelta": False}.items():
        changes = options | {"optimizer": optimizer}
        with built(changes) as ours:
            assert Stepping(ours, changes).stepper.update.is_queued == can


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_updated_where_a_sum_is_not_finite(precision, options):
    changes = options | {"precision": precision}
    with built(changes) as ours:
        stepping = Stepping(ours, changes)
        stepping.step(0)
        before, exchanged = stepping.adapters.named_tensors(), ours.adapters.gather_numbers
        ours.adapters.gather_numbers = lambda numbers: exchanged(numbers * numbers.new_tensor([1.0, torch.nan]))
        stepping.begin(1)
        with pytest.raises(TrainingStopped, match="step 2: the gradient's norm is nan, so nothing was updated"):
            stepping.stepper.end(0.0, 0.0)
        assert (stepping.stepper.done, stepping.stepper.publishing) == (1, False)
        after = stepping.adapters.named_tensors()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_nothing_is_updated_by_sums_that_lack_a_rank(options):
    """Another rank is gone, and this one saves what it has while its own GPU still waits in backward."""
    changes = options | {"precision": "bf16"}
    with built(changes) as ours:
        stepping = Stepping(ours, changes)
        stepping.step(0)
        adapters, before, saved = ours.adapters, stepping.adapters.named_tensors(), {}
        exchanged, check = adapters.gather_numbers, adapters.rescue.check

        def rescued(numbers: Tensor) -> Tensor:
            saved.update(adapters.working_tensors())
            return exchanged(numbers)

        adapters.gather_numbers = rescued
        adapters.rescue.check = lambda: None  # on a GPU the host has launched all of this before
        stepping.begin(1)
        adapters.rescue.check = check
        with pytest.raises(RuntimeError, match="remote process exited"):
            stepping.stepper.end(0.0, 0.0)
        assert all(torch.equal(before[name].bfloat16(), saved[name]) for name in saved)
        after = adapters.named_tensors()
        assert all(torch.equal(before[name], after[name]) for name in before)
