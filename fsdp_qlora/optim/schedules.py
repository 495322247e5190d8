"""Learning-rate schedules, in a table."""

import math
from collections.abc import Callable, Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fsdp_qlora.config.options import TrainingOptions


class Schedule(LambdaLR):
    """A schedule that goes on from any step."""

    def state(self) -> dict[str, int]:
        return {"updates": self.last_epoch}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Stand where `state` was taken; the rates from here on are those of this schedule, not of that one."""
        self.last_epoch = state["updates"]
        self._step_count = self.last_epoch + 1
        self._last_lr = [
            base * shape(self.last_epoch) for base, shape in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def make_schedule(options: TrainingOptions, optimizer: Optimizer, total_steps: int) -> Schedule:
    """Make the schedule of `--lr_scheduler`: warm-up over `warmup_ratio` of the steps, then the fall to zero.

    Step i (from 0) of w warm-up steps takes i/w of `lr`, so the first of them takes 0. The fall begins with the whole
    `lr` at step w and reaches zero after the last step, which still learns. As transformers' `get_scheduler`, whose
    import brings PEFT and bitsandbytes along: a quarter of the time of all imports, on every rank."""
    shape = SCHEDULES[options.lr_scheduler]
    warm_up = round(options.warmup_ratio * total_steps)
    return Schedule(optimizer, lambda step: shape(step, warm_up, total_steps))


def _constant(step: int, warm_up: int, total: int) -> float:
    """Return 1 throughout: no warm-up either."""
    return 1.0


def _linear(step: int, warm_up: int, total: int) -> float:
    if step < warm_up:
        return step / warm_up
    return max(0.0, (total - step) / max(1, total - warm_up))


def _cosine(step: int, warm_up: int, total: int) -> float:
    if step < warm_up:
        return step / warm_up
    return (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, total - warm_up)))) / 2


# By `--lr_scheduler`: the share of `lr` at (step, warm-up steps, all steps).
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
