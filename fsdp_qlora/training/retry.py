"""A step that ran out of GPU memory is tried again with less saved for backward, by all ranks together.

Nothing is lost: before the optimizer has stepped, a step leaves no trace but its gradients, and keep levels and
offloading change no bit of a result. This file has what a rank does then: what it frees, what it restores, what
the blocks keep from then on, and what the user is told. `training/step.py` says when.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import TrainingStopped, UserError, first_line, is_out_of_memory, release_frames
from fsdp_qlora.memory.arena import Arena
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.placement.base import Placement
from fsdp_qlora.plan.plan import Plan, kept_text
from fsdp_qlora.plan.planning import Planned, keep_activations, make_arena, refit_run, write_plan
from fsdp_qlora.units import count_of


class RandomState:
    """The random numbers that a step is going to draw on this rank, for the same step again or in another process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        if self._on_gpu is not None:
            torch.cuda.set_rng_state(self._on_gpu, self._device)

    def tensors(self) -> dict[str, Tensor]:
        """Return name -> uint8 [n], for `load`."""
        return {"host": self._host} | ({} if self._on_gpu is None else {"gpu": self._on_gpu})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers of another process, and draw them from here on. It may have had no GPU."""
        self._host = tensors["host"]
        if self._on_gpu is not None:
            self._on_gpu = tensors.get("gpu", self._on_gpu)
        self.restore()


def who_ran_out(why: str, world: World) -> dict[int, str]:
    """Return rank -> error, of the ranks that ran out of memory. why: this rank's error, or "". A collective, on the
    host."""
    if not any(failed for (failed,) in world.gather([bool(why)])):
        return {}
    said = [""] * world.size
    dist.all_gather_object(said, why)
    return {rank: one for rank, one in enumerate(said) if one}


def forget(error: BaseException, model: CausalModel) -> None:
    """Free what a pass over `model` that failed with `error` still holds: in its frames and in the model's blocks."""
    release_frames(error)
    for block in model.fused_blocks:
        block.forget()


class Refit:
    """What the blocks of a run keep from its first plan on, and less each time that GPU memory runs out.

    most_tokens: of a micro-batch, padding included. folder: where `plan.json` is, which is written again."""

    def __init__(
        self,
        planned: Planned,
        model: CausalModel,
        placement: Placement,
        most_tokens: int,
        world: World,
        folder: Path,
    ) -> None:
        self.planned, self.model, self.placement, self.most_tokens = planned, model, placement, most_tokens
        self.world, self.folder = world, folder
        self._apply()

    def __call__(self, step: int, ran_out: Mapping[int, str]) -> Arena | None:
        """Let the blocks keep less, as a new plan for what is free now says, and tell the user. Return the memory for
        the tensors of a step of such blocks; the one before must be gone. A collective.

        ran_out: rank -> its error's words. Raises TrainingStopped on every rank where nothing is left to give."""
        while ran_out:
            self._plan_less(step, ran_out)
            arena, why = self._arena()
            ran_out = who_ran_out(why, self.world)  # other processes may have taken what was free a moment ago
            if ran_out:
                arena = None
        self._apply()
        if self.world.is_main:
            self._note()
        return arena

    def first_arena(self, widens: bool) -> Arena | None:
        """Return the memory for the tensors of the first step. widens: as of the exchange that was chosen."""
        layout = self.planned.layout
        if layout is not None and layout.widens != widens:
            if isinstance(self.model, FSDPModule):
                self._no_layout()
            else:
                layout.exchanged(widens)
        return make_arena(self.planned.schedule, self.world)

    def _no_layout(self) -> None:
        """Plan without places from now on: the hooks of FSDP know no meta device, so nothing can be rehearsed."""
        self.planned = replace(self.planned, layout=None)

    def _arena(self) -> tuple[Arena | None, str]:
        """Return (the arena, ""), or (None, why there is none)."""
        try:
            return make_arena(self.planned.schedule, self.world), ""
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None, first_line(error)

    def _plan_less(self, step: int, ran_out: Mapping[int, str]) -> None:
        if isinstance(self.model, FSDPModule):
            self._no_layout()
        planned = refit_run(self.planned, self.world)
        if planned is None:
            raise TrainingStopped(out_of_memory(step, ran_out)).on_every_rank(self.world.rank)
        self.world.say(retry_line(step, ran_out, self.planned.plan, planned.plan, self.world.device.type == "cuda"))
        try:
            self.placement.shrink(planned.plan)
        except UserError as error:  # of host memory: what has begun is no mistake of the user's any more
            raise TrainingStopped(f"{out_of_memory(step, ran_out)}; {error}").on_every_rank(self.world.rank) from error
        self.planned = planned

    def _apply(self) -> None:
        planned, blocks = self.planned, self.planned.plan.blocks
        offloaded = [] if planned.layout is None else planned.layout.offloaded(blocks)
        keep_activations(self.model, blocks, self.most_tokens, self.world.device, planned.link_rate, offloaded)

    def _note(self) -> None:
        try:
            write_plan(self.folder, self.planned.record)
        except OSError as error:  # training is worth more than its record
            self.world.say(
                f"{self.folder / 'plan.json'} cannot be written again ({error.strerror}): it is the old plan"
            )


def retry_line(step: int, ran_out: Mapping[int, str], before: Plan, after: Plan, gpus: bool) -> str:
    """Return the line that a user sees of a step that is tried again."""
    line = f"step {step}: GPU memory ran out on {_on_ranks(ran_out)}; trying again with less saved for backward: "
    line += kept_text(after.blocks, gpus)
    line += _moved(before, after)
    if after.seconds is not None and before.seconds is not None:
        line += f"; expected {after.seconds:.3f} s a step (was {before.seconds:.3f})"
    return line


def out_of_memory(step: int, ran_out: Mapping[int, str]) -> str:
    """Return the line that ends a run where nothing can be given up."""
    rank, why = next(iter(ran_out.items()))
    return (
        f"rank {rank}: GPU memory ran out in step {step} ({why}); give the plan less, with a --gpu_memory_gib 1 or 2 "
        "below what the card has, or lower batch_size or context_length"
    )


def _on_ranks(ran_out: Mapping[int, str]) -> str:
    first, *others = ran_out
    ranks = f"ranks {', '.join(map(str, ran_out))}" if others else f"rank {first}"
    return f"{ranks} ({ran_out[first]})"


def _moved(before: Plan, after: Plan) -> str:
    """Say what of the base leaves the GPU."""
    left = sum(block.resident for block in before.blocks) - sum(block.resident for block in after.blocks)
    units = [count_of(left, "block")] if left else []
    units += ["the head"] if before.head_resident and not after.head_resident else []
    text = f"; {' and '.join(units)} moved to host memory" if units else ""
    return text + (f"; {after.staging} buffers" if after.staging != before.staging else "")
