"""Whether runs agree to the last bit: one plan twice, and two plans, with and without --deterministic true.

    python -m benchmarks.bits --out bits.jsonl [--steps 6] [--host_gib 7,12]

A small form of the home rig (ten layers of Llama-2-70B, 2 x 2048, rank 64, one GPU, the base streamed) is planned for
two sizes of host memory, so that blocks keep different things in different places. Each plan runs twice. Losses are
compared as they are recorded, all their digits; about half a minute a run.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.rig import measure

TIMES = 2  # each plan runs
OPTIONS = ["--lora_rank=64", "--use_cpu_offload=true"]
DETERMINISTIC = "--deterministic=true"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file the rows are appended to, one line each")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cap_gib", type=float, default=9.0)
    parser.add_argument("--host_gib", default="7,12", help="of host memory, one plan for each")
    asked = parser.parse_args()
    seconds = {}
    for deterministic in (False, True):
        rows = []
        for host in asked.host_gib.split(","):
            for _ in range(TIMES):
                rows.append(run(host, deterministic, asked))
                with asked.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
        seconds[deterministic] = [row["seconds_per_step"] for row in rows]
        print("\n".join(told(rows, deterministic)), flush=True)
    ratio = min(seconds[True]) / min(seconds[False])
    print(f"deterministic: {ratio:.3f} times as long as the default, by the fastest run of each")
    return 0


def run(host_gib: str, deterministic: bool, asked: argparse.Namespace) -> dict[str, Any]:
    """Run once; the row of `benchmarks/rig.py` with the plan's host memory and attention."""
    options = [*OPTIONS, f"--host_memory_gib={host_gib}", *([DETERMINISTIC] if deterministic else [])]
    rig = argparse.Namespace(
        shape="llama2_70b_10_layers", gpus=1, cap_gib=asked.cap_gib, batch_size=2, context_length=2048,
        steps=asked.steps, first_gpu=0, peer_access=False, train_options=options,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(rig, Path(scratch))
        plan = json.loads((Path(scratch) / "out" / "plan.json").read_text())
    return row | {"host_memory_gib": host_gib, "deterministic": deterministic, "plan": plan}


def told(rows: Sequence[dict[str, Any]], deterministic: bool) -> list[str]:
    """Lines on each run and on each pair of them."""
    lines = [f"deterministic {str(deterministic).lower()}"]
    for row in rows:
        lines.append(
            f"  {name(row, rows)}: {row['seconds_per_step']:.4f} s a step, attention by "
            f"{row['plan']['facts']['attention']}, losses {' '.join(map(repr, row['losses']))}"
        )
    for one, other in combinations(rows, 2):
        kind = "one plan" if one["host_memory_gib"] == other["host_memory_gib"] else "two plans"
        lines.append(
            f"  {kind}, {name(one, rows)} and {name(other, rows)}: {agreement(one['losses'], other['losses'])}"
        )
    return lines


def name(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    place = next(i for i, other in enumerate(rows) if other is row)
    return f"{row['host_memory_gib']} GiB run {place % TIMES + 1}"


def agreement(one: Sequence[float], other: Sequence[float]) -> str:
    """In which steps two runs' losses are the same numbers."""
    apart = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if not apart:
        return f"all {len(one)} losses agree to the last bit"
    most = max(abs(one[i] - other[i]) for i in apart)
    return (
        f"{len(one) - len(apart)} of {len(one)} losses agree; apart from step {apart[0] + 1} on, by at most {most:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
