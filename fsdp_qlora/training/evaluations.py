"""When a run evaluates, which evaluation was the best, and when it stops for want of a better one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from fsdp_qlora.config.options import EvaluationOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.report.records import EvalRecord
from fsdp_qlora.training.eval_answers import EvalAnswers
from fsdp_qlora.training.eval_questions import Asked, asked_of, memory_of
from fsdp_qlora.training.evaluate import Evaluator
from fsdp_qlora.units import count_of

__all__ = ["Asked", "EvalAnswers", "Evaluations", "asked_of", "check_evaluations", "memory_of"]


class Evaluations:
    """The evaluations of a run of `steps` steps. One before the first step is for comparison: it is never the best.

    answer: called after each, with the steps that are done."""

    def __init__(
        self,
        options: EvaluationOptions,
        evaluator: Evaluator,
        steps: int,
        steps_per_epoch: int,
        answer: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.answer = answer
        self.options, self.evaluator, self.steps, self.steps_per_epoch = options, evaluator, steps, steps_per_epoch
        self.best: EvalRecord | None = None
        self.kept: EvalRecord | None = None  # whose adapter is in output_dir, where save_best has put one there
        self.last: int | None = None  # steps that were done before the last evaluation
        self.without_improvement = 0  # evaluations since the best one

    def is_due(self, step: int) -> bool:
        """Return whether to evaluate after `step` steps, if that has not been done."""
        if step == self.last:
            return False
        if step == 0:
            return self.options.eval_on_start
        return step == self.steps or step % interval(self.options, self.steps, self.steps_per_epoch) == 0

    def evaluate(self, step: int, epoch: float, stop: Callable[[], bool]) -> EvalRecord | None:
        """Evaluate after `step` steps; None where `stop` ended it (see `Evaluator`). A collective.

        A loss that is not finite is no improvement; training, whose own losses are looked at, goes on."""
        found = self.evaluator(stop)
        if found is None:
            return None
        is_best = step > 0 and math.isfinite(found.loss) and (self.best is None or found.loss < self.best.loss)
        record = EvalRecord(
            step=step,
            epoch=epoch,
            loss=found.loss,
            label_tokens=found.label_tokens,
            tokens=found.tokens,
            rows=found.rows,
            seconds=found.seconds,
            is_best=is_best,
        )
        self.last = step
        if is_best:
            self.best, self.without_improvement = record, 0
        else:
            self.without_improvement += step > 0
        return record

    def is_to_be_kept(self, record: EvalRecord) -> bool:
        """Return whether output_dir is to have the adapter of this evaluation."""
        is_lower = self.kept is None or record.loss < self.kept.loss
        return self.options.save_best and record.step > 0 and math.isfinite(record.loss) and is_lower

    def state(self) -> Mapping[str, Any]:
        """Return what later evaluations are compared with (`training.checkpoint.Stateful`)."""
        best, kept = (None if record is None else asdict(record) for record in (self.best, self.kept))
        return {"best": best, "kept": kept, "last": self.last, "without_improvement": self.without_improvement}

    def load_state(self, state: Mapping[str, Any]) -> None:
        best, kept = (None if state[name] is None else EvalRecord(**state[name]) for name in ("best", "kept"))
        self.best, self.kept, self.last = best, kept, state["last"]
        self.without_improvement = state["without_improvement"]

    @property
    def is_exhausted(self) -> bool:
        """Whether so many evaluations were no improvement that the run is to stop."""
        patience = self.options.early_stopping_patience
        return patience is not None and self.without_improvement >= patience


def interval(options: EvaluationOptions, steps: int, steps_per_epoch: int) -> int:
    """Return the steps from one evaluation to the next."""
    return {0: steps_per_epoch, -1: steps}.get(options.eval_steps, options.eval_steps)


def check_evaluations(options: EvaluationOptions, steps: int, steps_per_epoch: int) -> None:
    """Raise UserError for an option that so few evaluations leave without effect."""
    count = -(-steps // interval(options, steps, steps_per_epoch))  # without the one before the first step
    some = f"with {count_of(count, 'evaluation')} in {count_of(steps, 'step')}"
    if options.save_best and count == 1:
        raise UserError(f"save_best: has no effect {some}; {_set_eval_steps(2, steps)}omit save_best")
    patience = options.early_stopping_patience
    if patience is not None and count < patience + 2:  # one is the best, and the last would stop nothing
        lower = f"set it to {count - 2}, or " if count > 2 else ""
        remedy = f"{lower}{_set_eval_steps(patience + 2, steps)}omit it"
        raise UserError(f"early_stopping_patience {patience}: has no effect {some}; {remedy}")


def _set_eval_steps(count: int, steps: int) -> str:
    """Return the advice that makes so many evaluations of a run of `steps`, '' where there is none."""
    largest = (steps - 1) // (count - 1)
    return f"set eval_steps to {largest}, or " if largest else ""
