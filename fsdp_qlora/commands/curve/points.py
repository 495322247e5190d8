"""The work of curve: points trained and measured one after the other, what is finished kept and gone on with."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.commands.curve.figures import Point, csv, read_point, table
from fsdp_qlora.commands.curve.options import CurveOptions
from fsdp_qlora.commands.curve.picture import draw
from fsdp_qlora.commands.curve.programs import as_typed, checking, measuring, run_program, train_script, training
from fsdp_qlora.commands.curve.row_check import check_rows, contents_of
from fsdp_qlora.commands.evaluate_rows import FILE
from fsdp_qlora.config.options import OPTIONS, Config, show
from fsdp_qlora.data.sources import is_local
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.runtime.files import Claim, writing_to
from fsdp_qlora.runtime.libraries import go_offline_if_unreachable
from fsdp_qlora.training.agreement import NO_MATTER

RECORD, CSV, PICTURE = "curve.json", "curve.csv", "curve.png"
ADAPTER = "adapter_model.safetensors"
DECISIVE = ("model", "adapter", "data", "training", "evaluation")  # groups whose options make a point what it is


def draw_curve(own: CurveOptions, train: Config) -> None:
    """Make all points of a curve. Raises UserError and TrainingStopped; what is finished stays."""
    train_script()
    ranks = _ranks(own.gpus)
    _reach_hub(own, train)
    points = sorted(own.rows)
    with Claim() as claim:
        curve = Curve(own, train, ranks)
        curve.check_agreement()
        notes = check_rows(train.data.dataset, own.eval_dataset, train.evaluation.eval_samples, points[-1])
        curve.check_measuring()
        claim.take(curve.folder, own.overwrite_output_dir or curve.earlier is not None)
        curve.begin(points)
        for note in notes:
            print(note)
        made = [rows for rows in points if curve.make(rows)]
        if not made:
            curve.write()
        print(f"saved   {curve.folder / PICTURE}", *(f"        {curve.folder / n}" for n in (CSV, RECORD)), sep="\n")


class Curve:
    """A curve in its folder: which options its points have, which of them are trained, which measured."""

    def __init__(self, own: CurveOptions, train: Config, ranks: int) -> None:
        self.own, self.train, self.ranks = own, train, ranks
        self.folder = Path(own.output_dir)
        self.earlier = None if own.overwrite_output_dir else _read(self.folder / RECORD)
        self.options = _decisive(own, train, ranks)
        self.trained: list[int] = [] if self.earlier is None else self.earlier["trained"]

    def check_agreement(self) -> None:
        """Raise UserError where the points in the folder were made with other options, or of other rows."""
        if self.earlier is None:
            return
        before, now = self.earlier["options"], self.options
        changed = [name for name in now if before.get(name) != now[name]]
        told = [f"{name} {show(now[name])} (was {show(before.get(name))})" for name in changed if name in OPTIONS or
                name in vars(self.own)]  # fmt: skip
        told += [f"the rows of {name.removesuffix('_content')}" for name in changed if name.endswith("_content")]
        if told:
            raise UserError(
                f"output_dir: {self.folder} has a curve of other options: {', '.join(told)}; set them as before, "
                "choose another folder, or --overwrite_output_dir true to make all points anew"
            )

    def check_measuring(self) -> None:
        """Let evaluate look at its rows and options before anything trains, unless it has measured a point of these.

        Raises UserError or TrainingStopped where it would refuse them."""
        if self.earlier is not None and self.finished():
            return
        command = checking(self.own, self.train, self.place(0), self.ranks)
        self._run("before anything trains", "evaluate", command, "nothing has been trained")

    def begin(self, points: Sequence[int]) -> None:
        """Take the folder over. The points of an earlier curve that is to be replaced go now, with their checkpoints:
        none may be gone on with under other options."""
        with writing_to(self.folder, "output_dir"):
            if self.own.overwrite_output_dir:
                for place in self._places().values():
                    shutil.rmtree(place)
            self._note()
        done = [rows for rows in points if read_point(self.place(rows), rows) is not None]
        if done:
            print(f"finished  {', '.join(map(str, done))} of {', '.join(map(str, points))} rows")

    def place(self, rows: int) -> Path:
        """Return the folder of a point."""
        return self.folder / f"rows-{rows}"

    def finished(self) -> list[Point]:
        """Return all points of the folder that are measured, also those that are not asked for now."""
        return [point for rows, place in self._places().items() if (point := read_point(place, rows)) is not None]

    def make(self, rows: int) -> bool:
        """Train and measure a point, as far as that has not been done. Return whether anything was left to do."""
        place = self.place(rows)
        if read_point(place, rows) is not None:
            return False
        if rows and not (rows in self.trained and (place / ADAPTER).exists()):
            self._make(rows, "train.py", training(self.train, rows, place, self.ranks, self._going_on(place)))
            self.trained = sorted({*self.trained, rows})
            self._note()
        self._make(rows, "evaluate", measuring(self.own, self.train, rows, place, self.ranks))
        if read_point(place, rows) is None:
            raise TrainingStopped(f"rows {rows}: {place / FILE} has no figures of this point; remove it, start again")
        self.write()
        return True

    def write(self) -> None:
        """Write record, table and picture of the points that are finished, and show the table."""
        points = self.finished()
        self._note()
        with writing_to(self.folder, "output_dir"):
            with atomic_file(self.folder / CSV) as part:
                part.write_text(csv(points))
            with atomic_file(self.folder / PICTURE) as part:
                draw(part, self.train.model.model_name, points)
        print("", *table(points), "", sep="\n", flush=True)

    def _places(self) -> dict[int, Path]:
        """Return rows -> folder of all points that there are, the fewest rows first."""
        names = [path.name.removeprefix("rows-") for path in self.folder.glob("rows-*") if path.is_dir()]
        return {
            rows: self.place(rows)
            for rows in sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
        }

    def _going_on(self, place: Path) -> dict[str, Any]:
        """Return what train.py is told of a point that it may have begun."""
        if self.train.output.save_steps is not None:
            return {"resume": "auto"}
        return {"overwrite_output_dir": True} if place.is_dir() and any(place.iterdir()) else {}

    def _make(self, rows: int, name: str, command: list[str]) -> None:
        self._run(f"rows {rows}", name, command, "finished points stay, and the same command goes on")

    def _run(self, what: str, name: str, command: list[str], left: str) -> None:
        """Run a program. what: it is run for. left: by one that fails, for the user."""
        print(f"\n{what}: {as_typed(command)}\n", flush=True)
        code = run_program(command)
        if code:
            kind = UserError if code == 2 else TrainingStopped
            raise kind(f"{what}: {name} ended with exit code {code} and says why above; {left}")

    def _note(self) -> None:
        points = [{"rows": p.rows, "folder": self.place(p.rows).name, **p.record} for p in self.finished()]
        record = {"options": self.options, "trained": self.trained, "points": points}
        with writing_to(self.folder, "output_dir"), atomic_file(self.folder / RECORD) as part:
            part.write_text(json.dumps(record, indent=1) + "\n")


def _decisive(own: CurveOptions, train: Config, ranks: int) -> dict[str, Any]:
    """Return what all points of a curve have in common."""
    values = {
        name: value
        for name, value in train.to_flat().items()
        if OPTIONS[name].group in DECISIVE and name not in (*NO_MATTER, "dataset_samples")
    }
    values |= {"measures": own.measures, "normalize": own.normalize, "max_new_tokens": own.max_new_tokens}
    contents = {f"{name}_content": contents_of(values[name], name) for name in ("dataset", "eval_dataset")}
    return values | {"gpus": ranks} | contents


def _read(file: Path) -> dict[str, Any] | None:
    """Return the record of an earlier start; None where there is none that can be read."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if isinstance(record["options"], dict) and isinstance(record["trained"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ranks(asked: int) -> int:
    """Return how many processes each program has. Raises UserError where there are too few GPUs."""
    there = torch.cuda.device_count()
    if 0 < there < asked:
        raise UserError(f"gpus {asked}: there are {there}; ask for at most so many")
    return asked if asked > 0 else max(1, there)


def _reach_hub(own: CurveOptions, train: Config) -> None:
    """Print a line if the hub is needed and does not answer: this process and its children use the cache then."""
    if not Path(train.model.model_name).is_dir() or not (is_local(train.data.dataset) and is_local(own.eval_dataset)):
        note = go_offline_if_unreachable()
        if note is not None:
            print(note, flush=True)
