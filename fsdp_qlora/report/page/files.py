"""The files of a run's folder, read with an eye to what a killed run, another program or a bad disk leaves of them."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.units import count_of

HUGE = 1e100  # numbers beyond it are taken for infinite: no run has them, and a picture's arithmetic would overflow


@dataclass(frozen=True)
class Missing:
    """A file, or a part of one, that there is nothing to show of, and one sentence on why."""

    why: str


@dataclass
class Lines:
    """The objects of a file of JSON lines, and how many lines are none."""

    file: Path
    damaged: int = 0
    is_cut: bool = False  # its last line is half written, as of a run that is going on or was killed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield one object after the other. Raises OSError."""
        with self.file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for line in lines:
                value = _object(line)
                if value is not None:
                    yield value
                elif not line.endswith("\n"):
                    self.is_cut = True
                elif line.strip():
                    self.damaged += 1

    @property
    def note(self) -> str:
        """Return a sentence on what was left out; "" where that is nothing."""
        said = [f"{count_of(self.damaged, 'line')} could not be read"] if self.damaged else []
        said += ["the last line is half written"] if self.is_cut else []
        return f"{self.file.name}: {' and '.join(said)}; left out here." if said else ""


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json(file: Path) -> Any | Missing:
    """Return what a JSON file holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return Missing(f"{file.name} is not in the folder.")
    except OSError as error:
        return unreadable(file, error)
    except (ValueError, RecursionError):
        return damaged(file)


def unreadable(file: Path, error: OSError) -> Missing:
    return Missing(f"{file.name} cannot be read ({error.strerror or error}).")


def damaged(file: Path) -> Missing:
    return Missing(f"{file.name} is damaged: it is not what a run writes.")


def number(value: object) -> float:
    """Return a number of JSON; NaN of all else, infinity of what is huge."""
    if type(value) is float and -HUGE < value < HUGE:  # nearly all of them
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    if -HUGE < value < HUGE:
        return float(value)
    return math.nan if value != value else math.inf if value > 0 else -math.inf


def loss_text(loss: float) -> str:
    """Return a loss as a text: 1.2345, and 1.2e-09 or 1e+06 where so many places show nothing, or too much."""
    return f"{loss:.4f}" if not loss or 1e-3 <= abs(loss) < 1e5 else f"{loss:.4g}"


def numbers(value: object) -> list[float]:
    """Return a list of numbers; an empty one of all else."""
    return [number(item) for item in value] if isinstance(value, list) else []


def count(value: object) -> int | None:
    """Return a whole number from 0 on, as steps and rows are; None of all else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None
