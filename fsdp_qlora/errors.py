"""The two ways a run ends early: the user can mend it before it starts, or it stopped in the middle."""

import errno
import traceback
from typing import Self

# Words of CUDA, cuBLAS, cuDNN and Triton where they find no memory: they raise plain RuntimeErrors.
_NO_MEMORY = ("out of memory", "alloc_failed", "host_allocation_failed", "error_memory_allocation")
# Of the machine, its disks and its limits; others are as likely mistakes of ours, which need a traceback.
_REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOMEM, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
# What to do with the options of a GPU on a machine without one.
OR_ELSEWHERE = "or plan for a rig that is not here: --plan_only true --plan_for 2x4090"


class RunEnded(Exception):
    """One line for the user, as `str(error)`."""

    told_elsewhere = False  # another rank says the same: this one keeps silent

    def on_every_rank(self, rank: int) -> Self:
        """This error where all ranks raise the same: rank 0 tells the user."""
        self.told_elsewhere = rank != 0
        return self


class UserError(RunEnded, ValueError):
    """A mistake of the user's: one line saying what, its value, what is allowed and what to do. Exit code 2."""


class BadRow(UserError):
    """One row of a dataset that cannot be taken, with its place: the run ends, or --bad_rows skip leaves it out."""


class TrainingStopped(RunEnded, RuntimeError):
    """A run that had begun cannot go on: one line saying where, why, and what to do. Exit code 1."""


def first_line(error: BaseException) -> str:
    """What `error` says, without what follows the first line; its class's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def refused_by_system(error: BaseException) -> str:
    """Return in words what the system refused this process: disk space, a file, host memory; "" of other errors."""
    if isinstance(error, MemoryError):
        return f"host memory: {first_line(error)}"
    return str(error) if isinstance(error, OSError) and error.errno in _REFUSALS else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that a GPU has no memory left, PyTorch's allocator or a library of CUDA's.

    Not where a collective met it: ranks whose communicator has failed cannot go on."""
    names = {kind.__name__ for kind in type(error).__mro__}  # by name: torch takes a second to import
    if "DistError" in names or "RuntimeError" not in names or isinstance(error, RunEnded):
        return False
    said = str(error).lower()
    return "OutOfMemoryError" in names or any(words in said for words in _NO_MEMORY)


def release_frames(error: BaseException) -> None:
    """Free the local variables of all frames that `error`, and what it was raised from, have passed through."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
