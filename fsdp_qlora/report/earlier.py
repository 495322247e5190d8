"""The record of a run that goes on: the lines of metrics.jsonl up to the checkpoint, and none of what is done again."""

import dataclasses
import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsdp_qlora.report.records import EvalRecord, StepRecord

FIELDS = {field.name for field in dataclasses.fields(StepRecord)}
EVAL_FIELDS = [field.name for field in dataclasses.fields(EvalRecord)]


def lines_until(file: Path, step: int) -> list[str]:
    """Return the lines of a metrics.jsonl up to `step`; what a killed run left of a line is left out.

    Raises OSError where the file is there and cannot be read."""
    with suppress(FileNotFoundError):
        return [
            line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if _step_of(line) <= step
        ]
    return []


def records_in(lines: Iterable[str]) -> list[StepRecord]:
    """Return the optimizer steps among the lines of a metrics.jsonl."""
    values = [json.loads(line) for line in lines]
    return [StepRecord(**_of_step(value)) for value in values if value.keys() >= FIELDS]


def evaluations_in(lines: Iterable[str]) -> list[EvalRecord]:
    """Return the evaluations among the lines of a metrics.jsonl."""
    values = [json.loads(line) for line in lines]
    return [EvalRecord(**_of_evaluation(value)) for value in values if "eval_loss" in value]


def _of_evaluation(value: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value[name] if name in value else value[f"eval_{name}"] for name in EVAL_FIELDS}
    return fields | {"loss": math.nan if fields["loss"] is None else fields["loss"]}


def _of_step(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a step; JSON has null for what was infinite."""
    return {name: math.inf if value[name] is None else value[name] for name in FIELDS}


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
