"""Runs train.py's main for many command lines in one launch, with GPU memory running out where each case says so.

    torchrun --nproc_per_node 2 tests/support/ranks_that_run_out.py CASES.json RESULTS

CASES.json: name -> {"arguments": [...], "keep": level, "offloaded": bool, "shrinks": bool, "faults": [[rank, place,
call], ...]}: the plan's blocks keep that level, or the plan has nothing to give, and the call (from 1, over the whole
run) of that rank at that place of `PLACES` raises what PyTorch's allocator does. shrinks: resident blocks and the head
go to host memory then. Writes RESULTS/NAME.RANK.json.
"""

import contextlib
import io
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import train
from fsdp_qlora.memory import activation_offload as offload
from fsdp_qlora.models import causal_lm as model
from fsdp_qlora.models.fused import attention, gated_mlp
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.optim.gradient_reduction import GradientReduction
from fsdp_qlora.optim.master_weights import Masters
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.plan import plan as plans
from fsdp_qlora.plan import planning
from fsdp_qlora.plan.plan import Plan
from fsdp_qlora.training.step import Stepper
from tests.support.meeting import RANK, meet_at
from tests.support.pictures import without_pictures

train.HEAD_START_SECONDS = 0.0  # this launch does not end with the first rank that does
MESSAGE = "CUDA out of memory. Tried to allocate 226.00 MiB. GPU 0 has a total capacity of 23.99 GiB\nSee documentation"
LEANEST = "leanest"  # a keep level of a case
LIBRARY = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"

# name -> (where it is looked up, its name there, whether memory runs out after it has done its work)
PLACES: dict[str, tuple[Any, str, bool]] = {
    "forward": (gated_mlp.GatedMlpHalf, "forward", False),  # once a block and micro-batch
    "backward": (attention.AttentionHalf, "backward", False),
    "backward's end": (FusedBlock, "input_gradient", True),  # with gradients handed over, and not taken
    "head": (model, "linear_cross_entropy", True),
    "offloading": (offload.ActivationOffload, "offload", True),
    "restoring": (offload.ActivationOffload, "restore", True),
    "gradients": (GradientReduction, "_take", True),
    "reduced gradients": (GradientReduction, "_accumulate", False),  # after the exchange has begun
    "sums": (ShardedAdapters, "gather_numbers", False),
    "update": (Masters, "unfold", False),
    "cuBLAS": (gated_mlp, "glu_forward", True),
}


class Faults:
    """Raises at the calls of this rank that a case names."""

    def __init__(self, faults: list[tuple[int, str, int]]) -> None:
        self.wanted = {(place, call) for rank, place, call in faults if rank == RANK}
        self.calls: Counter[str] = Counter()
        self.in_step = False

    def step(self, begin: Callable[..., Any]) -> Callable[..., Any]:
        """`begin`, a step's passes: no other call counts, as those of the rehearsal."""

        @wraps(begin)
        def wrapped(*arguments: Any) -> Any:
            self.in_step = True
            try:
                return begin(*arguments)
            finally:
                self.in_step = False

        return wrapped

    def at(self, place: str, do: Callable[..., Any], late: bool) -> Callable[..., Any]:
        @wraps(do)
        def wrapped(*arguments: Any, **more: Any) -> Any:
            self.calls[place] += self.in_step
            fails = self.in_step and (place, self.calls[place]) in self.wanted
            if fails and not late:
                self.fail(place)
            result = do(*arguments, **more)
            if fails:
                self.fail(place)
            return result

        return wrapped

    def fail(self, place: str) -> None:
        if place == "cuBLAS":
            raise RuntimeError(LIBRARY)
        raise torch.OutOfMemoryError(MESSAGE)


def planned(keep: str, offloaded: bool) -> Callable[..., Plan]:
    """`make_plan`, whose blocks keep something else."""
    make = planning.make_plan

    def otherwise(*arguments: Any) -> Plan:
        plan = make(*arguments)
        if keep == LEANEST:
            return leanest(plan, *arguments)
        blocks = tuple(replace(block, keep=keep, offloaded=offloaded) for block in plan.blocks)
        for layout in arguments[4:]:
            layout(blocks)  # before anything is loaded
        return replace(plan, blocks=blocks)

    return otherwise


def leanest(plan: Plan, *arguments: Any) -> Plan:
    """What is left of a plan once no refit gives anything: on a GPU not always the level that saves least."""
    while (less := plans.refit_plan(plan, *arguments)) is not None:
        plan = less
    return plan


def shrunk(*arguments: Any) -> Plan | None:
    """`refit_plan`, which leaves the last block resident and two buffers."""
    plan = plans.refit_plan(*arguments)
    if plan is None:
        return None
    blocks = (*(replace(block, resident=False) for block in plan.blocks[:-1]), plan.blocks[-1])
    return replace(plan, blocks=blocks, head_resident=False, staging=2)


def run(case: dict[str, Any], undo: contextlib.ExitStack) -> int:
    faults = Faults([tuple(fault) for fault in case["faults"]])
    for place, (owner, name, late) in PLACES.items():
        undo.enter_context(patch.object(owner, name, faults.at(place, getattr(owner, name), late)))
    undo.enter_context(without_pictures())
    undo.enter_context(patch.object(Stepper, "_begin", faults.step(Stepper._begin)))
    if case["keep"]:
        undo.enter_context(patch.object(planning, "make_plan", planned(case["keep"], case["offloaded"])))
    if case["shrinks"]:
        undo.enter_context(patch.object(planning, "refit_plan", shrunk))
    return train.main(case["arguments"])


def main(cases: Path, results: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # and NaN in all memory that nobody has written
    warnings.filterwarnings("ignore", message=".*determinis")  # which that brings on a GPU
    for name, case in json.loads(cases.read_text()).items():
        meet_at(name)
        start, out, err = time.monotonic(), io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.ExitStack() as undo:
            try:
                code = run(case, undo)
            except BaseException:
                traceback.print_exc()
                code = -1
        (results / f"{name}.{RANK}.json").write_text(
            json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()})
        )
        sys.stdout.write(f"rank {RANK}: {name} ended with {code} after {time.monotonic() - start:.1f} s\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
