"""CPU seconds of a plan for 70B on two 24 GB cards, on a machine without a GPU: the first start, and one after it.

    python -m benchmarks.plan_seconds --cache FOLDER [--host_memory_gib 38.3]

An empty folder makes it the first start; run it again for the next. The model is on the meta device, as in a run; the
rates are those of a recorded run, for nothing is measured here. Prints JSON: seconds of planning, of the layout of an
evaluation's forward, and of what was done meanwhile.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from benchmarks.rig import SHAPES
from fsdp_qlora import rig_plan
from fsdp_qlora.config.cards import rig_of
from fsdp_qlora.config.options import Config
from fsdp_qlora.config.parse import parse
from fsdp_qlora.optim.optimizers import state_bytes
from fsdp_qlora.plan import costs, layouts
from fsdp_qlora.plan.inputs import Facts, facts_of
from fsdp_qlora.plan.plan import Budget
from fsdp_qlora.plan.planning import fastest_of, sending
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.remembered import program, remembering
from fsdp_qlora.plan.search import Search
from fsdp_qlora.units import GIB

RESULTS = Path(__file__).parent / "results" / "2026-11-28-h200-grid.jsonl"
RIG, ROW, DEVICE_GIB = "2x4090", "70b-packed", 22.3
OPTIONS = ("--lora_rank=64", "--batch_size=2", "--context_length=2048", "--plan_only=true", f"--plan_for={RIG}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", required=True, type=Path)
    parser.add_argument("--host_memory_gib", default=38.3, type=float)
    asked = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = str(asked.cache)
    print(json.dumps(measured(Budget(int(DEVICE_GIB * GIB), int(asked.host_memory_gib * GIB)))))


def measured(budget: Budget) -> dict[str, Any]:
    config, rig = parse(["--model_name=70b", "--dummy_weights=true", *OPTIONS]), rig_of(RIG)
    shape = LlamaConfig(**SHAPES["llama2_70b"])
    built = rig_plan.build_for(config, rig, shape)
    world, rates = rig_plan.world_of(rig), recorded()

    def known(sized: Config) -> tuple[Facts, Rates]:
        optimizer = state_bytes(config.training.optimizer, "cuda")
        facts = facts_of(built.model, sized, world, built.fusion, optimizer, rig.card.capability)
        return sending(replace(facts, exchange_by_host=True)), rates

    def layouts_of(sized: Config, facts: Facts) -> layouts.Layouts:
        return layouts.Layouts(built.model, sized, facts.context, facts.exchange_by_host, world)

    seconds: dict[str, float] = defaultdict(float)
    for place, name in ((Search, "best"), (costs, "trace"), (layouts, "rehearse"), (layouts, "place")):
        setattr(place, name, timed(getattr(place, name), name, seconds))
    start = time.process_time()
    program()
    seconds["digest of the sources"] = time.process_time() - start
    with remembering():
        planned = fastest_of(config, budget, world, known, layouts_of)
    done = time.process_time()
    assert planned.layout is not None
    planned.layout.of_forward()
    plan = {"placement": planned.plan.placement, "seconds": planned.plan.seconds}
    times = {"plan": done - start, "forward": time.process_time() - done, **seconds}
    return plan | {name: round(value, 3) for name, value in times.items()}


def recorded() -> Rates:
    rows = map(json.loads, RESULTS.read_text().splitlines())
    return Rates(**next(row["rates"] for row in rows if row["name"] == ROW))


def timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """Return the function, whose CPU seconds are added to those of its name."""

    def run(*given: Any) -> Any:
        start = time.process_time()
        try:
            return function(*given)
        finally:
            seconds[name] += time.process_time() - start

    return run


if __name__ == "__main__":
    main()
