"""Where a run ran: versions, cards, hosts, of each process that trained a part of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.report.page.files import Missing, count, damaged, number, read_json
from fsdp_qlora.report.page.html import Html, paragraph, section, table, text
from fsdp_qlora.report.page.public import public
from fsdp_qlora.report.parts import FILE
from fsdp_qlora.units import as_gib


@dataclass(frozen=True)
class Part:
    """A process's part of a run. ended: how, "" where that is not recorded. told: what it ran on, by name."""

    from_step: int  # done before it
    last_step: int  # done when it ended; 0 where that is not recorded
    steps: int  # of the whole run, as it was to be
    ended: str
    told: dict[str, str]


def read_parts(folder: Path) -> list[Part] | Missing:
    """Read a run's environment.json: at least one part."""
    file = folder / FILE
    record = read_json(file)
    if isinstance(record, Missing):
        return (
            record if file.exists() else Missing(f"{FILE} is not in the folder: what this run ran on is not recorded.")
        )
    try:
        return [_part(part) for part in record["parts"]] or damaged(file)
    except (KeyError, TypeError, AttributeError, ValueError):
        return damaged(file)


def environment_section(parts: list[Part] | Missing) -> Html:
    """Return a table with a column for each part of the run."""
    title = "Environment"
    if isinstance(parts, Missing):
        return section("environment", title, paragraph(parts.why))
    first = parts[0].from_step
    said = [paragraph(f"What steps up to {first:,} ran on is not recorded.")] if first else []
    head = ["", *(f"from step {part.from_step + 1:,}" for part in parts)]
    names = dict.fromkeys(name for part in parts for name in part.told)
    rows = [(text(name), *(text(part.told.get(name, "not recorded")) for part in parts)) for name in names]
    return section("environment", title, *said, table(title, head, rows))


def _part(part: Mapping[str, Any]) -> Part:
    from_step, ended = count(part["from_step"]), part.get("ended") or {}
    if from_step is None:
        raise ValueError("a part begins at no step")
    how = public(str(ended.get("how", "")))
    told = _told(part) | {"ended": f"{how}, after step {ended.get('step', 'not recorded')}" if how else "not recorded"}
    return Part(from_step, count(ended.get("step")) or 0, count(part.get("steps")) or 0, how, told)


def _told(part: Mapping[str, Any]) -> dict[str, str]:
    versions, hosts = part.get("versions") or {}, part.get("hosts") or []
    cards = [f"{gpu['name']}, {as_gib(number(gpu['memory_bytes']))}" for gpu in part.get("gpus") or []]
    drivers = sorted({str(host["driver"]) for host in hosts if host.get("driver")})
    told = {
        "started": _time(str(part.get("started", "not recorded"))),
        "fsdp_qlora": _program(part),
        **{("CUDA" if name == "cuda" else str(name)): str(version) for name, version in versions.items()},
        "ranks": str(part.get("ranks", "not recorded")),
        "GPUs": _counted(cards) or "none",
    }
    if drivers:
        told["driver"] = ", ".join(drivers)
    if hosts:
        told["host memory"] = _counted([as_gib(number(host["memory_bytes"])) for host in hosts])
        told["cores"] = _counted([str(host["cores"]) for host in hosts])
        told["system"] = _counted([str(host.get("system", "")) for host in hosts])
    return told


def _time(iso: str) -> str:
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _program(part: Mapping[str, Any]) -> str:
    commit = f", commit {part['commit']}" if part.get("commit") else ""
    return f"{part.get('program') or 'version not recorded'}{commit}"


def _counted(names: Sequence[str]) -> str:
    return "; ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(names).items())
