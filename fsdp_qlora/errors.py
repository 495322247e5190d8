"""The two ways a run ends early: the user can mend it before it starts, or it stopped in the middle."""

from typing import Self


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
