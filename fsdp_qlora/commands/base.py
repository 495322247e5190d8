"""A command of `python -m fsdp_qlora`: its name is its key in the table, the rest is here."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from fsdp_qlora.config.options import Asked, Program
from fsdp_qlora.runtime.libraries import go_offline_if_unreachable


@dataclass(frozen=True)
class Command(Generic[Asked]):
    """does: one line for the overview. run: imports what takes long inside; raises RunEnded for whatever ends it.
    interrupted: what is left after an interruption, and what the same command does next. ranks: whether torchrun may
    start it on several."""

    does: str
    program: Program[Asked]
    run: Callable[[Asked], None]
    interrupted: str
    ranks: bool = False


def ready_for_hub(adapter: str, model_name: str | None) -> None:
    """Print a line if the base is on the hub and the hub does not answer: its clients then use their cache.

    Before they are imported. model_name: what the user named; else the adapter's folder says it."""
    named = model_name
    if named is None:
        try:
            named = str(
                json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return  # said where the adapter is read
    note = None if Path(named).is_dir() else go_offline_if_unreachable()
    if note is not None:
        print(note, flush=True)
