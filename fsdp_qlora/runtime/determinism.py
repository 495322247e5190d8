"""Deterministic algorithms, for as long as a run with `--deterministic true` lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fsdp_qlora.config.options import TrainingOptions
from fsdp_qlora.errors import OR_ELSEWHERE, UserError


@contextmanager
def deterministic_algorithms(asked: bool) -> Iterator[None]:
    """Let PyTorch, and the kernels that ask it (`kernels.device.deterministic`), sum in fixed orders inside, if asked.

    An operator of PyTorch that has no such form raises RuntimeError. Memory that nobody has written stays as it is:
    filling it, as PyTorch then does by itself, is a pass over every tensor that an operator makes."""
    if not asked:
        yield
        return
    memory: Any = torch.utils.deterministic
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = filled


def check_deterministic(options: TrainingOptions, device: torch.device) -> None:
    """Raise UserError where `--deterministic true` has no effect."""
    if options.deterministic and device.type != "cuda":
        raise UserError(
            "deterministic: true has no effect without a GPU, where runs agree to the bit anyway; omit it, "
            f"{OR_ELSEWHERE}"
        )
