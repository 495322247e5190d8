"""The parts of a run, in environment.json: from which step each process trained it, on what, and how that ended.

A run that was never resumed has one part."""

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsdp_qlora.atomic_files import atomic_file

FILE = "environment.json"


def begin_part(folder: Path, environment: Mapping[str, Any], steps: int, earlier: tuple[Path, int] | None) -> None:
    """Note that a run of so many steps in all begins here, or goes on. Raises OSError.

    earlier: (folder, step) of the run that this one continues: its parts up to there are kept."""
    folder_before, first = earlier if earlier is not None else (folder, 0)
    before = [part for part in parts_in(folder_before) if part["from_step"] < first]
    now = {"from_step": first, "steps": steps, "started": _now(), **environment}
    _write(folder, [*before, now])


def end_part(folder: Path, step: int, how: str) -> None:
    """Note of the last part how it ended, after which step of the run. Raises OSError."""
    *before, last = parts_in(folder) or [{"from_step": 0}]
    _write(folder, [*before, last | {"ended": {"time": _now(), "step": step, "how": how}}])


def parts_in(folder: Path) -> list[dict[str, Any]]:
    """Return the parts that are recorded in a folder; none where the file is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        parts = json.loads((folder / FILE).read_text(encoding="utf-8"))["parts"]
        return [part for part in parts if isinstance(part["from_step"], int)]
    return []


def _write(folder: Path, parts: list[dict[str, Any]]) -> None:
    with atomic_file(folder / FILE) as file:
        file.write_text(json.dumps({"parts": parts}, indent=1) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
