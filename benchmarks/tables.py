"""Tables of docs/performance.md, made of the rows in benchmarks/results/.

    python -m benchmarks.tables        writes the page's tables anew; its text stays as it is

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. New rows go into a file of benchmarks/results/; the
newest of a name counts. A name that has no row yet makes no line.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import sweep
from fsdp_qlora.kernels.cost import Cost
from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Kinds
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.rates import Rates

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
Row = dict[str, Any]

# Work as a reader calls it, and the name of its row.
HOME = (
    ("2 x 512", "70b-512"),
    ("2 x 2048", "70b-2048-38.3"),
    ("2 x 2048", "70b-2048-64"),
    ("2 x 2048", "70b-2048-92"),
    ("2 x 2048, 1 card", "70b-2048-one-64"),
    ("2 x 2048, 4 cards", "70b-2048-4-92"),
    ("2 x 2048, 3 bits (HQQ)", "70b-hqq3"),
    ("2 x 2048, 2 bits (HQQ), 1 card", "70b-hqq2-one"),
    ("1 x 16384", "70b-16k"),
    ("1 x 32768", "70b-32k"),
    ("2 packed bins of 2,048", "70b-packed"),
    ("2 rows of 150", "70b-rows-2"),
    ("16 rows of 150", "70b-rows-16"),
)
ONE_CARD = (
    ("4 x 2048", "8b-full"),
    ("4 packed bins of 2,048", "8b-packed"),
    ("4 x 2048, card of 8 GiB", "8b-4x2048-r16-8-30"),
    ("4 x 2048, card of 12 GiB", "8b-4x2048-r16-12-20"),
    ("4 x 2048, card of 48 GiB", "8b-4x2048-r16-48-60"),
    ("8 x 512, card of 12 GiB", "8b-8x512-r16-12-10"),
    ("1 x 16384", "8b-1x16384-r16-24-60"),
    ("1 x 32768, rank 32", "8b-1x32768-r32-24-30"),
    ("1 x 78592, rank 32", "8b-78k"),
)
# Train types beside `qlora` in the same commit's rows.
CODECS = {
    "8b-full": ("8b-hqq4", "8b-hqq3", "8b-hqq2", "8b-dora", "8b-hqq-dora"),
    "70b20": ("70b20-hqq4", "70b20-hqq3", "70b20-hqq2", "70b20-dora", "70b20-hqq-dora"),
}
FLOOR = ("70b-512", "70b-2048-38.3", "70b-2048-64", "70b-2048-92", "70b-2048-4-92", "70b-16k", "8b-full", "8b-all")
MEMORY_BOUND, TIME_BOUND = 0.05, 0.15  # beyond which a row of the grid is told by name


def main() -> int:
    PAGE.write_text(written(PAGE.read_text()))
    return 0


def written(page: str) -> str:
    """Return the page with its tables made anew."""
    return MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", page)


def recorded(kind: str) -> list[Row]:
    """Return all rows of the files `*-KIND.jsonl`, oldest first."""
    files = sorted(RESULTS.glob(f"*-{kind}.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def newest() -> dict[str, Row]:
    """Return the newest row of each name."""
    return {row["name"]: row for row in [*recorded("grid"), *recorded("sweep")] if "failed" not in row}


def home() -> str:
    return _runs(HOME)


def one_card() -> str:
    return _runs(ONE_CARD)


def _runs(works: Iterable[tuple[str, str]]) -> str:
    rows = newest()
    head = ("batch x context a card", "tok/s", "s planned, came", "GiB planned, reserved", "host GiB planned", "row")
    return _table(head, [_run(work, rows[name]) for work, name in works if name in rows])


def _run(work: str, row: Row) -> tuple[str, ...]:
    planned, came, run = row["predicted"], row["measured"], row["run"]
    reserved = f"{_gib(planned['device_bytes'])}, {came['reserved_gib']:.2f}"
    host = f"{planned['host_bytes'] / 2**30:.1f}"
    return work, f"{run['tokens_per_second']:,.0f}", _seconds(row), reserved, host, f"`{row['name']}`, {_made(run)}"


def codecs() -> str:
    lines = []
    rows = recorded("grid")
    for base, others in CODECS.items():
        for first in (row for row in rows if row["name"] == base):
            run = first["run"]
            beside = [row for row in rows if row["name"] in others and row["run"]["commit"] == run["commit"]]
            beside.sort(key=lambda row: others.index(row["name"]))
            for row in [first, *beside] if beside else []:
                share = row["run"]["tokens_per_second"] / run["tokens_per_second"]
                speed = f"{row['run']['tokens_per_second']:,.0f}"
                allocated = f"{row['measured']['allocated_gib']:.2f}"
                told = "" if row is first else f"{share:.0%}"
                lines.append((f"`{row['name']}`", speed, told, allocated, _seconds(row), _made(row["run"])))
    return _table(("row", "tok/s", "of qlora", "GiB allocated", "s planned, came", "commit"), lines)


def sweep_table() -> str:
    return sweep.table(recorded("sweep"))


def accuracy() -> str:
    """Return how far all rows of the grid were from their plans, and the newest of those in no other table."""
    rows = recorded("grid")
    elsewhere = {
        *(name for _, name in HOME + ONE_CARD),
        *CODECS,
        *(name for names in CODECS.values() for name in names),
    }
    memory, times = (statistics.median(map(abs, shares)) for shares in zip(*map(_off, rows), strict=True))
    far = sorted({row["name"] for row in rows if not _is_met(row)})
    told = (
        f"{len(rows)} runs of {len({row['name'] for row in rows})} configurations: half of them within {memory:.1%} "
        f"of the planned memory and {times:.1%} of the planned time.\n"
        f"Beyond {MEMORY_BOUND:.0%} or {TIME_BOUND:.0%}: {', '.join(f'`{name}`' for name in far)}."
    )
    lines = [
        (f"`{name}`", f"{row['run']['gpus']} x {row['run']['batch_size']} x {row['run']['context_length']}",
         f"{_gib(row['predicted']['device_bytes'])}, {row['measured']['allocated_gib']:.2f}", _seconds(row),
         _made(row["run"]))
        for name, row in sorted({row["name"]: row for row in rows}.items()) if name not in elsewhere
    ]  # fmt: skip
    head = ("row", "GPUs x batch x context", "GiB planned, allocated", "s planned, came", "commit")
    return f"{told}\n\n{_table(head, lines)}"


def _off(row: Row) -> tuple[float, float]:
    """Return how much more memory and time came than was planned, as shares."""
    planned, came = row["predicted"], row["measured"]
    return came["allocated_gib"] * 2**30 / planned["device_bytes"] - 1, came["seconds"] / planned["seconds"] - 1


def _is_met(row: Row) -> bool:
    memory, time = _off(row)
    return abs(memory) <= MEMORY_BOUND and abs(time) <= TIME_BOUND


def floor() -> str:
    rows = newest()
    head = ("row", "PFLOP at least, done", "s for these", "GB to each GPU", "s for these", "s came", "of it the larger")
    return _table(head, [_floor(rows[name]) for name in FLOOR if name in rows])


def _floor(row: Row) -> tuple[str, ...]:
    """Return what a step must compute and copy, by the counts of the plan and the rates of the run's start."""
    facts, rates, plan = Facts(**row["facts"]), Rates(**row["rates"]), row["plan"]
    clock = Clock(facts, rates)
    blocks = tuple(BlockPlan(**block) for block in plan["blocks"])
    candidate = Candidate(plan["placement"], blocks, plan["head_resident"], plan["staging"])
    least, done = _products(clock, (("all", False),) * facts.layers), _products(clock, candidate.kinds)
    link, came = clock.link(candidate)[0], row["measured"]["seconds"]
    computing = _product_seconds(done, rates)
    return (
        f"`{row['name']}`", f"{_flop(least) / 1e15:.2f}, {_flop(done) / 1e15:.2f}",
        f"{_product_seconds(least, rates):.2f}, {computing:.2f}", f"{link * rates.h2d / 1e9:.1f}", f"{link:.2f}",
        f"{came:.3f}", f"{max(computing, link) / came:.0%}",
    )  # fmt: skip


def _products(clock: Clock, kinds: Kinds) -> Cost:
    """Return the cost of a step whose blocks are of these kinds."""
    return sum(
        (clock.memory.of[kind].forward + clock.memory.of[kind].backward for kind in kinds), clock.memory.head.cost
    )


def _flop(cost: Cost) -> float:
    return cost.forward + cost.backward + cost.skinny + cost.attention + cost.attention_backward


def _product_seconds(cost: Cost, rates: Rates) -> float:
    """Return the seconds of matmuls and attention alone, adapters' matmuls at the rate of the others."""
    matmuls = (cost.forward + cost.skinny) / rates.matmul_forward + cost.backward / rates.matmul_backward
    return matmuls + cost.attention / rates.attention_forward + cost.attention_backward / rates.attention_backward


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines))


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f}"


def _seconds(row: Row) -> str:
    return f"{row['predicted']['seconds']:.3f}, {row['measured']['seconds']:.3f}"


def _made(run: Row) -> str:
    """Return the commit, and the card where it is no H200."""
    card = run["device"].split()[1]
    return run["commit"][:7] + ("" if card == "H200" else f" ({card})")


TABLES: dict[str, Callable[[], str]] = {
    "home": home,
    "one_card": one_card,
    "codecs": codecs,
    "sweep": sweep_table,
    "accuracy": accuracy,
    "floor": floor,
}

if __name__ == "__main__":
    sys.exit(main())
