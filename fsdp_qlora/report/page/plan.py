"""The plan of a run as plan.json has it: what was where, and what it was expected to take."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.report.page.files import Missing, count, damaged, number, read_json

FILE = "plan.json"


@dataclass(frozen=True)
class Block:
    """A decoder block. resident: its frozen bytes stay on the GPU. keep: what it saves for backward. offloaded: that
    waits in host memory."""

    resident: bool
    keep: str
    offloaded: bool


@dataclass(frozen=True)
class Plan:
    """A plan. Bytes are of the rank, or of the node's host memory, with most."""

    placement: str
    blocks: list[Block]
    head_resident: bool
    has_head: bool  # of its own: else the embedding's table is used
    staging: int  # buffers
    micro_batch: int
    accumulation: int
    parts: dict[str, float]  # of device_bytes
    device_bytes: float
    loading_bytes: float  # NaN in records from before it was noted
    host_bytes: float
    seconds: float  # of a step; NaN where no times were known
    ranks: int
    is_fused: bool
    remat: bool  # blocks that are not fused run under activation checkpointing
    on_gpus: bool


def read_plan(folder: Path) -> Plan | Missing:
    """Read a run's plan.json."""
    file = folder / FILE
    record = read_json(file)
    if isinstance(record, Missing):
        return record
    try:
        return _plan(record["plan"], record["facts"], record["rates"] is not None)
    except (KeyError, TypeError, ValueError, AttributeError):
        return damaged(file)


def _plan(plan: Mapping[str, Any], facts: Mapping[str, Any], on_gpus: bool) -> Plan:
    blocks = [Block(bool(b["resident"]), str(b["keep"]), bool(b["offloaded"])) for b in plan["blocks"]]
    return Plan(
        placement=str(plan["placement"]),
        blocks=blocks,
        head_resident=bool(plan["head_resident"]),
        has_head=bool(facts["head_bytes"]),
        staging=_whole(plan["staging"]),
        micro_batch=_whole(facts["batch"]),
        accumulation=_whole(facts["accumulation"]),
        parts={str(name): number(nbytes) for name, nbytes in plan["parts"].items()},
        device_bytes=number(plan["device_bytes"]),
        loading_bytes=number(plan.get("loading_bytes")),
        host_bytes=number(plan["host_bytes"]),
        seconds=number(plan["seconds"]),
        ranks=_whole(facts["ranks"]),
        is_fused=bool(facts["fused"]),
        remat=bool(facts["remat"]),
        on_gpus=on_gpus,
    )


def _whole(value: object) -> int:
    found = count(value)
    if found is None:
        raise ValueError(f"{value!r} is no number of things")
    return found
