"""Settings over what users own, each run as planned: what the plan said, what came, whether memory held.

    python -m benchmarks.sweep --out sweep.jsonl [--only 70b-2048-92,8b-8k] [--gpus 4] [--list] [--steps 30]
    python -m benchmarks.sweep --table benchmarks/results/*-sweep.jsonl

Runs share the machine's GPUs: several of few GPUs go at the same time where `--gpus` are more (and then share its host
memory's rate as well). A line holds if no step ran out of memory or was tried again, the allocator never retried after
the second step, what is reserved is within 1 % of what was planned, and the median step within 5 % (10 % on four GPUs).
"""

import argparse
import json
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.plan_grid import GRID_SHAPES, Case, row
from benchmarks.rig import SHAPES

CARD = 23.6  # GiB that an RTX 4090 or 3090 shows
LONGEST = 262144
QWEN_32B = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": LONGEST}  # fmt: skip
SHAPES.update(GRID_SHAPES)
SHAPES["sweep_70b_10"] = {**GRID_SHAPES["grid_70b"], "num_hidden_layers": 10}
SHAPES["sweep_32b"] = QWEN_32B
SHAPES["sweep_32b_16"] = {**QWEN_32B, "num_hidden_layers": 16}


def case(shape: str, gpus: int, batch: int, context: int, rank: int, cap: float, host: float, *options: str) -> Case:
    return Case(shape, gpus, batch, context, rank, options, cap, False, host)


def settings() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for host in (38.3, 64, 92, 110):
        found[f"70b-2048-{host:g}"] = case("grid_70b", 2, 2, 2048, 64, CARD, host)
    for host in (38.3, 60, 92, 160):
        found[f"70b-2048-4-{host:g}"] = case("grid_70b", 4, 2, 2048, 64, CARD, host)
    found["70b-512-38"] = case("grid_70b", 2, 2, 512, 64, CARD, 38.4)
    found["70b-512-38-accumulate-4"] = case("grid_70b", 2, 2, 512, 64, CARD, 38.4, "--gradient_accumulation_steps=4")
    found["70b-16k-125"] = case("grid_70b", 2, 1, 16384, 64, CARD, 125)
    found["70b-2048-one-64"] = case("grid_70b", 1, 2, 2048, 64, CARD, 64)
    found["70b-152-38"] = case("grid_70b", 2, 2, 152, 64, CARD, 38.4)
    found["32b-1024-one-40"] = case("sweep_32b", 1, 2, 1024, 32, CARD, 40)
    # Ten of 80 layers: what a layer takes does not depend on how many there are.
    for cap, host in ((8, 6), (8, 7), (8, 12), (8, 20), (12, 6), (12, 9), (12, 20), (16, 12), (7.5, 8)):
        found[f"70b10-2048-{cap:g}-{host:g}"] = case("sweep_70b_10", 1, 2, 2048, 64, cap, host)
    for batch, context, rank, cap, host in (
        (2, 512, 64, 8, 7),
        (8, 152, 64, 8, 7),
        (1, 8192, 64, 12, 16),
        (1, 16384, 16, 16, 40),
        (3, 1000, 8, 8, 7),
        (2, 2048, 128, 12, 10),
    ):
        found[f"70b10-{batch}x{context}-r{rank}-{cap}-{host}"] = case(
            "sweep_70b_10", 1, batch, context, rank, cap, host
        )  # fmt: skip
    for batch, context, rank, cap, host in (
        (4, 2048, 16, 8, 30), (4, 2048, 16, 12, 20), (4, 2048, 16, 16, 20), (4, 2048, 16, 24, 60),
        (4, 2048, 16, 48, 60), (2, 4096, 16, 12, 40), (8, 512, 16, 12, 10), (8, 152, 16, 24, 20), (1, 152, 8, 8, 10),
        (1, 16384, 16, 24, 60), (1, 65536, 16, 24, 60), (1, 32768, 32, 24, 30), (4, 2048, 128, 24, 30),
        (2, 2048, 64, 12, 12), (1, 4096, 32, 8, 24),
    ):  # fmt: skip
        found[f"8b-{batch}x{context}-r{rank}-{cap}-{host}"] = case("grid_8b", 1, batch, context, rank, cap, host)
    found["32b16-2048-12"] = case("sweep_32b_16", 1, 2, 2048, 32, 12, 16)
    found["32b16-4096-16"] = case("sweep_32b_16", 1, 1, 4096, 64, 16, 24)
    found["70b20-2048-two-12"] = case("grid_70b_20_layers", 2, 2, 2048, 64, 12, 14)
    found["70b20-512-two-9"] = case("grid_70b_20_layers", 2, 2, 512, 64, 9, 12)
    found["8b-two-8"] = case("grid_8b", 2, 4, 1024, 16, 8, 20)
    found["8b-four-8"] = case("grid_8b", 4, 4, 1024, 16, 8, 40)
    return found


@dataclass
class Lane:
    """GPUs of the machine, handed out to runs in neighbouring numbers."""

    free: list[bool]
    changed: threading.Condition

    def take(self, count: int) -> int:
        with self.changed:
            while True:
                for first in range(0, len(self.free) - count + 1, count):
                    if all(self.free[first : first + count]):
                        self.free[first : first + count] = [False] * count
                        return first
                self.changed.wait()

    def give(self, first: int, count: int) -> None:
        with self.changed:
            self.free[first : first + count] = [True] * count
            self.changed.notify_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"), help="a line for each is appended here")
    parser.add_argument(
        "--only", default="", help="names of settings, or beginnings of several names, with commas between"
    )
    parser.add_argument("--gpus", type=int, default=1, help="of the machine; larger settings are left out")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of such files, oldest first, and stop")
    parser.add_argument("train_options", nargs="*", help="after --: further options of train.py, for every run")
    asked = parser.parse_args()
    if asked.table:
        print(table([json.loads(line) for file in asked.table for line in file.read_text().splitlines()]))
        return 0
    known, wanted = settings(), [name for name in asked.only.split(",") if name]
    chosen = {
        name: one
        for name, one in known.items()
        if one.gpus <= asked.gpus
        and (not wanted or any(name == part if part in known else name.startswith(part) for part in wanted))
    }
    if asked.list:
        print("\n".join(f"{name:28} {one}" for name, one in chosen.items()))
        return 0
    lane = Lane([True] * asked.gpus, threading.Condition())
    threads = []
    for name, one in sorted(chosen.items(), key=lambda item: -item[1].gpus):
        first = lane.take(one.gpus)
        thread = threading.Thread(target=_run, args=(name, one, first, lane, asked))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return 0


def _run(name: str, one: Case, first: int, lane: Lane, asked: argparse.Namespace) -> None:
    start = time.time()
    line: dict[str, Any]
    try:
        line = row(name, replace(one), asked.steps, asked.train_options, first)
    except (SystemExit, Exception) as error:
        line = {"name": name, "failed": f"{type(error).__name__}: {error}"}
    finally:
        lane.give(first, one.gpus)
    with lane.changed, asked.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"SWEEP {name}: {told(line)}; {time.time() - start:.0f} s in all", flush=True)


def told(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"FAILED {line['failed']}"
    planned, came, run = line["predicted"], line["measured"], line["run"]
    gib = planned["device_bytes"] / 2**30
    return (
        f"{run['tokens_per_second']:,.0f} tok/s, {planned['seconds']:.3f} s planned, {came['seconds']:.3f} came "
        f"({planned['seconds'] / came['seconds'] - 1:+.1%}), first steps {run['first_seconds']}; "
        f"{gib:.2f} GiB planned, {came['allocated_gib']:.2f} allocated, {came['reserved_gib']:.2f} reserved, "
        f"{run['card_gib']:.2f} on the card of {run['cap_gib']:g}; host {planned['host_bytes'] / 2**30:.1f} planned, "
        f"{came['host_gib']:.1f} came; {run['gpu_retries']} retries, {run['retries_after_2']} after step 2, "
        f"{run.get('step_retries', 0)} steps repeated"
    )


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table with the newest line of each setting, and how many settings hold."""
    order = {name: place for place, name in enumerate(settings())}
    # Copies on one stream were tried beside turns (docs/LOG.md) and are not what runs now.
    newest = {line["name"]: line for line in lines if line.get("run", {}).get("link") != "single"}
    found = sorted(newest.values(), key=lambda line: order.get(line["name"], len(order)))
    rows = [
        "| setting | GPUs | card GiB | host GiB | tok/s | s planned, came | GiB planned, reserved | holds | commit |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for line in found:
        if "failed" in line:
            rows.append(f"| {line['name']} | | | | | {line['failed'][:60]} | | no | |")
            continue
        planned, came, run = line["predicted"], line["measured"], line["run"]
        gib = planned["device_bytes"] / 2**30
        host = next(option.partition("=")[2] for option in run["options"] if option.startswith("--host_memory_gib"))
        rows.append(
            f"| {line['name']} | {run['gpus']} | {run['cap_gib']:g} | {host} | {run['tokens_per_second']:,.0f} | "
            f"{planned['seconds']:.3f}, {came['seconds']:.3f} | {gib:.2f}, {came['reserved_gib']:.2f} | "
            f"{'yes' if holds(line) else 'no'} | {run['commit'][:7]} |"
        )
    return "\n".join([*rows, "", f"{sum(map(holds, found))} of {len(found)} hold."])


def holds(line: dict[str, Any]) -> bool:
    """Tell whether memory and time came as planned, by the bounds above."""
    if "failed" in line:
        return False
    planned, came, run = line["predicted"], line["measured"], line["run"]
    late = came["seconds"] / planned["seconds"] - 1
    more = came["reserved_gib"] * 2**30 / planned["device_bytes"] - 1
    bound = 0.10 if run["gpus"] > 2 else 0.05
    return run["retries_after_2"] == 0 and not run.get("step_retries") and abs(more) <= 0.01 and abs(late) <= bound


if __name__ == "__main__":
    sys.exit(main())
