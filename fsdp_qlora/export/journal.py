"""merge.json: what is merged into a folder and what of it is done, for a start that goes on and for the record."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fsdp_qlora.atomic_files import atomic_file, sweep
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.peft import ADAPTER_CONFIG
from fsdp_qlora.export.tensor_files import INDEX
from fsdp_qlora.runtime.files import Claim, check_empty

JOURNAL = "merge.json"
ROWS = 32  # of a matrix, in which what rounding loses is summed: few, so that they stay in cache


@dataclass
class Rounding:
    """Sums over all elements that adapters change: of learnt^2, of learnt * changed and of (changed - learnt)^2.

    learnt: what the adapter adds, exactly. changed: by how much the number that is saved differs from the base's."""

    learnt: float = 0.0
    kept: float = 0.0
    noise: float = 0.0

    def add(self, base: Tensor, exact: Tensor, saved: Tensor) -> None:
        for rows in zip(base.split(ROWS), exact.split(ROWS), saved.split(ROWS), strict=True):
            before, summed, after = (row.float().flatten() for row in rows)
            learnt, changed, noise = summed - before, after - before, after - summed
            self.learnt += float(learnt.dot(learnt))  # of one piece in float32: ten times as fast as a float64 sum
            self.kept += float(learnt.dot(changed))
            self.noise += float(noise.dot(noise))

    def share_kept(self) -> float:
        """Return how much of the learnt change is in the saved numbers, 1 for all: its projection on the learnt one."""
        return self.kept / self.learnt if self.learnt else 1.0

    def share_noise(self) -> float:
        """Return the size of the rounding's noise over that of the learnt change."""
        return math.sqrt(self.noise / self.learnt) if self.learnt else 0.0


@dataclass
class Journal:
    """merge.json. asked: what is merged into what. done: file -> the sums of its rounding. finished: all is there."""

    asked: Mapping[str, Any]
    done: dict[str, Rounding] = field(default_factory=dict)
    finished: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the file. Raises OSError."""
        done = {name: vars(sums) for name, sums in self.done.items()}
        text = json.dumps(
            {"asked": self.asked, "done": done, "finished": self.finished, "report": self.report}, indent=2
        )
        with atomic_file(folder / JOURNAL) as part:
            part.write_text(text + "\n")

    def rounding(self) -> Rounding:
        """Return the sums of all files."""
        sums = self.done.values()
        return Rounding(sum(s.learnt for s in sums), sum(s.kept for s in sums), sum(s.noise for s in sums))


def read_journal(folder: Path) -> Journal | None:
    """Return the journal of a folder, None where there is none that can be read."""
    try:
        found = json.loads((folder / JOURNAL).read_text())
        done = {name: Rounding(**sums) for name, sums in found["done"].items()}
        return Journal(found["asked"], done, bool(found["finished"]), found["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def take(folder: Path, asked: Mapping[str, Any], overwrite: bool, compares: bool, claim: Claim) -> Journal | None:
    """Take the folder; return the journal of an earlier start of the same merge, which goes on.

    compares: whether one that is finished goes on with its comparison, where that is still to be done."""
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"output_dir: {folder} holds an adapter, whose base programs would open in place of the merged model; "
            "choose another folder"
        )
    claim.take(folder, overwrite=True)  # looks for other runs only
    sweep(folder, lambda name: name == "tokenizer" or name.endswith((".safetensors", ".json")), dead_only=False)
    before = read_journal(folder)
    unfinished = before is not None and not before.finished
    if before is not None and before.asked == asked and (unfinished or (compares and not before.report)):
        return before
    if before is not None and unfinished and not overwrite:
        differing = [name for name, value in asked.items() if before.asked.get(name) != value]
        raise UserError(
            f"output_dir: {folder} holds an unfinished merge of something else ({', '.join(differing)} differ); choose "
            "another folder, or --overwrite_output_dir true"
        )
    if not overwrite:
        check_empty(folder)
    return None


def clear(folder: Path) -> None:
    """Remove the files of an earlier model, which would be mixed with this one."""
    for file in folder.glob("*"):
        if file.suffix == ".safetensors" or file.name in (INDEX, JOURNAL, "config.json"):
            file.unlink()
