"""The plan against the measured grid: the arithmetic as it is now, from the facts and rates kept beside each run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_grid
from fsdp_qlora.plan.candidate import BlockPlan, Candidate
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.plan import Budget, Wishes, make_plan, plan_record
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.units import GIB
from tests.support.known_runs import H200, facts

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*-grid.jsonl"))  # what was measured of the grid, by date and device
ROWS = [json.loads(line) | {"file": file.stem} for file in FILES for line in file.read_text().splitlines()]
SWEEP = [
    row
    for file in sorted(RESULTS.glob("*-sweep.jsonl"))
    for row in map(json.loads, file.read_text().splitlines())
    if "failed" not in row and row["run"].get("link") != "single"
]
# Bound by the host, which several runs shared or which slows in a run; four cards that share host memory's rate.
UNMET_SWEEP = {
    ("8b-8x152-r16-24-20", "6d02727"),
    ("8b-8x152-r16-24-20", "2c59587"),
    ("8b-8x512-r16-12-10", "4c3ef1d"),
    ("8b-two-8", "e3aefa3"),
    ("70b-512-38", "4c3ef1d"),
    ("70b-2048-4-92", "4c3ef1d"),
}
NAMES = [f"{row['file']}:{row['name']}" for row in ROWS]
# 26 % short: bound by the host's launches, of which the arithmetic knows too little (docs/LOG.md). And 24 % long: its
# attention was measured at 4,096 tokens, where it is slower than at 78,592. Of two short rows the host's work is 0.66 s
# by its launches alone and 0.8 s of copies hide it, as planned; what came is 0.26 s more.
UNMET = {
    "2026-11-24-h200-grid:8b-stream",
    "2026-11-25-h100-grid:8b-78k",
    "2026-11-28-h200-grid:70b-rows-2",
}
timed = pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=[pytest.mark.xfail(strict=True)] if n in UNMET else [], id=n)
     for r, n in zip(ROWS, NAMES, strict=True)],
)  # fmt: skip


def candidate_of(row: dict[str, Any]) -> Candidate:
    plan = row["plan"]
    blocks = tuple(BlockPlan(**block) for block in plan["blocks"])
    return Candidate(plan["placement"], blocks, plan["head_resident"], plan["staging"])


def copied(row: dict[str, Any]) -> bool:
    """Return whether gate and up were copied when they were offloaded, as they were at rank 16 and are not now."""
    return row["facts"]["lora_rank"] == 16 and any(b["keep"] == "all" and b["offloaded"] for b in row["plan"]["blocks"])


@pytest.mark.parametrize("row", [pytest.param(row, id=row["name"]) for row in SWEEP if not copied(row)])
def test_memory_is_met_within_3_percent(row: dict[str, Any]) -> None:
    """Of rows since a step's tensors have places, before they are laid out; but where loading is the peak, which
    PyTorch's allocator gives."""
    memory, candidate = Memory(Facts(**row["facts"])), candidate_of(row)
    step, loading = (sum(parts(candidate).values()) for parts in (memory.step_parts, memory.loading_parts))
    bound = 0.03 if step > loading else 0.05
    assert max(step, loading) == pytest.approx(row["measured"]["allocated_gib"] * GIB, rel=bound)


@pytest.mark.parametrize("row", SWEEP, ids=[row["name"] for row in SWEEP])
def test_a_planned_runs_time_is_met_within_8_percent(row: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if (row["name"], row["run"]["commit"][:7]) in UNMET_SWEEP:
        request.applymarker(pytest.mark.xfail(strict=True))
    predicted = Clock(Facts(**row["facts"]), Rates(**row["rates"])).seconds(candidate_of(row))
    assert predicted == pytest.approx(row["measured"]["seconds"], rel=0.08)


@timed
def test_time_is_met_within_15_percent(row: dict[str, Any]) -> None:
    predicted = Clock(Facts(**row["facts"]), Rates(**row["rates"])).seconds(candidate_of(row))
    assert predicted == pytest.approx(row["measured"]["seconds"], rel=0.15)


def test_the_grid_has_enough_configurations() -> None:
    assert len({row["name"] for row in ROWS}) >= 12


def test_the_grid_is_wide_enough() -> None:
    """7B to 70B, 512 to 16k tokens, one and two GPUs."""
    facts = [Facts(**row["facts"]) for row in ROWS]
    assert {f.ranks for f in facts} >= {1, 2}
    assert min(f.context for f in facts) <= 512
    assert max(f.context for f in facts) >= 16384
    assert {4096, 8192} <= {f.hidden for f in facts}


@pytest.mark.slow
def test_the_script_knows_its_configurations() -> None:
    command = [sys.executable, "-m", "benchmarks.plan_grid", "--list", "--only", "8b-all,70b-512"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["8b-all", "70b-512"]
    wrong = subprocess.run([*command[:-1], "9b"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "9b is none of" in wrong.stderr


def test_a_line_is_all_that_the_prediction_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = facts("llama2_70b", 2, 512, 64, ranks=2)
    made = make_plan(known, H200, Wishes(), Budget(24 * GIB, 64 * GIB))

    def measure(asked: Any, scratch: Path) -> dict[str, Any]:
        (scratch / "out").mkdir()
        (scratch / "out" / "plan.json").write_text(json.dumps(plan_record(made, known, H200)))
        names = ("gpu_allocated_gib", "gpu_reserved_gib", "host_gib", "seconds_per_step")
        return dict.fromkeys(names, 1.0) | {"losses": [], "batch_size": asked.batch_size}

    monkeypatch.setattr(plan_grid, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["plan_grid", "--out", str(tmp_path / "grid.jsonl"), "--only", "70b-512,70b-2048"])
    assert plan_grid.main() == 0
    line = json.loads((tmp_path / "grid.jsonl").read_text().splitlines()[0])
    assert line["name"] == "70b-512"
    assert candidate_of(line) == made.candidate
    assert Clock(Facts(**line["facts"]), Rates(**line["rates"])).seconds(candidate_of(line)) == made.seconds


def test_a_failed_run_does_not_end_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def measure(asked: Any, scratch: Path) -> dict[str, Any]:
        raise SystemExit("train.py ended with 2")

    monkeypatch.setattr(plan_grid, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["plan_grid", "--out", str(tmp_path / "grid.jsonl"), "--only", "8b-all,8b-short"])
    assert plan_grid.main() == 1
    told = capsys.readouterr().out
    assert told.count("FAILED") == 2
    assert "0 of 2 ran; not 8b-all, 8b-short" in told
