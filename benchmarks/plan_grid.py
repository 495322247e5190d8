"""What the plan predicts beside what comes: train.py over a grid of shapes, lengths, placements and keep levels.

    python -m benchmarks.plan_grid --out plan_grid.jsonl [--only 8b-all,70b-512] [--gpus 2] [--list] [-- ...]

Each configuration is one run of a few steps, as benchmarks/rig.py makes it, and one line: the facts and rates that its
plan was made from, the plan, and the measured peak and seconds. tests/plan/test_plan_grid.py predicts again from the
facts and rates kept here, with the arithmetic as it then is, and fails where that is off by more than 5 % or 15 %. Most
use few layers of a large model's width: what a layer takes does not depend on how many there are, and loading does.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rig import SHAPES, WARM_UP, measure

STEPS = WARM_UP + 4
LONGEST = 262144  # tokens that every shape here may take; rotary tables are made for the context alone
LLAMA3_8B = {**SHAPES["llama3_8b"], "max_position_embeddings": LONGEST}
LLAMA2_70B = {**SHAPES["llama2_70b"], "max_position_embeddings": LONGEST}
GRID_SHAPES = {
    "grid_8b": LLAMA3_8B,
    "grid_13b_20_layers": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 20,
                           "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
                           "max_position_embeddings": LONGEST},
    "grid_34b_12_layers": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 12,
                           "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
                           "max_position_embeddings": LONGEST},
    "grid_70b_20_layers": {**LLAMA2_70B, "num_hidden_layers": 20},
    "grid_70b": LLAMA2_70B,
}  # fmt: skip

ON_GPU = "--use_activation_cpu_offload=false"
IN_HOST = "--use_activation_cpu_offload=true"
NO_STREAM = "--use_cpu_offload=false"
STREAM = "--use_cpu_offload=true"


@dataclass(frozen=True)
class Case:
    """One run. options: of train.py, beside those that rig.py gives. host_gib: of host memory, for the plan."""

    shape: str
    gpus: int
    batch: int
    context: int
    rank: int
    options: tuple[str, ...] = ()
    cap_gib: float = 24.0
    peer_access: bool = False
    host_gib: float = 100.0


def keeping(level: str, where: str = ON_GPU) -> tuple[str, ...]:
    return (f"--keep_activations={level}", where)


def resident(blocks: int) -> tuple[str, ...]:
    return STREAM, f"--resident_blocks={blocks}"


SHARD = (NO_STREAM, "--sharding_strategy=full_shard")
REPLICATE = (NO_STREAM, "--sharding_strategy=ddp")
SHORT_ROWS, PACKED = ("--dummy_row_tokens=150",), "--packing=true"
FSDP2 = (STREAM, "--cpu_offload_by=fsdp2")
BNB_DORA = ("--train_type=bnb_dora",)


def hqq(bits: int, adapter: str = "lora") -> tuple[str, ...]:
    return f"--train_type=hqq_{adapter}", f"--n_bits={bits}"


CASES = {
    "8b-all": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *keeping("all")), cap_gib=40),
    "8b-input": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *keeping("input"))),
    "8b-short": Case("grid_8b", 1, 1, 512, 16, (NO_STREAM, *keeping("input"))),
    "8b-8x512": Case("grid_8b", 1, 8, 512, 16, (NO_STREAM, *keeping("halves"))),
    "8b-offload": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *keeping("attention", IN_HOST))),
    "8b-stream": Case("grid_8b", 1, 2, 1024, 16, (*resident(8), *keeping("halves"))),
    "8b-16k": Case("grid_8b", 1, 1, 16384, 16),
    "8b-32k": Case("grid_8b", 1, 1, 32768, 32),
    "8b-two": Case("grid_8b", 2, 4, 1024, 16, (*REPLICATE, *keeping("qkv"))),
    "13b-stream": Case("grid_13b_20_layers", 1, 2, 2048, 32, (*resident(5), *keeping("qkv"))),
    "13b-shard": Case("grid_13b_20_layers", 2, 2, 2048, 32, (*SHARD, *keeping("attention"))),
    "34b-4k": Case("grid_34b_12_layers", 2, 1, 4096, 32, (STREAM,)),
    "34b-fsdp2": Case("grid_34b_12_layers", 2, 2, 1024, 32, (*FSDP2, *keeping("input"))),
    "70b20-512": Case("grid_70b_20_layers", 2, 2, 512, 64, (*resident(0), *keeping("input"))),
    "70b20-2048": Case("grid_70b_20_layers", 2, 2, 2048, 64, (*resident(4), *keeping("halves", IN_HOST))),
    "70b20-shard": Case("grid_70b_20_layers", 2, 2, 2048, 64, (*SHARD, *keeping("qkv"))),
    "70b20-peers": Case("grid_70b_20_layers", 2, 2, 512, 64, (*SHARD, *keeping("input")), peer_access=True),
    "70b20-peers-own": Case("grid_70b_20_layers", 2, 2, 512, 64, peer_access=True),
    "70b20-peers-shard": Case("grid_70b_20_layers", 2, 2, 512, 64, SHARD, peer_access=True),
    "70b20-peers-stream": Case("grid_70b_20_layers", 2, 2, 512, 64, resident(0), peer_access=True),
    "70b20-peers-tight": Case("grid_70b_20_layers", 2, 2, 512, 64, cap_gib=11, peer_access=True),
    "70b20-peers-tight-shard": Case("grid_70b_20_layers", 2, 2, 512, 64, SHARD, cap_gib=11, peer_access=True),
    "70b20-16k": Case("grid_70b_20_layers", 2, 1, 16384, 64, (*resident(0), *keeping("attention", IN_HOST))),
    "70b20-one": Case("grid_70b_20_layers", 1, 1, 4096, 64, (STREAM, *keeping("attention"))),
    # 42 GiB for the whole job: Python, CUDA and their libraries took 1.73 of them on each rank (d81e298, H200s).
    "70b-512": Case("grid_70b", 2, 2, 512, 64, host_gib=38.4),
    "70b-2048": Case("grid_70b", 2, 2, 2048, 64, host_gib=38.3),
    # Rows as long as Alpaca's: as they are, more of them, and packed.
    "70b-rows-2": Case("grid_70b", 2, 2, 512, 64, SHORT_ROWS, host_gib=38.4),
    "70b-rows-16": Case("grid_70b", 2, 16, 512, 64, SHORT_ROWS, host_gib=38.3),
    "70b-packed": Case("grid_70b", 2, 2, 2048, 64, (*SHORT_ROWS, PACKED), host_gib=38.3),
    "8b-rows-8": Case("grid_8b", 1, 8, 512, 16, (NO_STREAM, *SHORT_ROWS)),
    "8b-packed": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *SHORT_ROWS, PACKED)),
    "8b-full": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM,)),
    # Other codecs and adapters, beside 8b-full and 70b20.
    "8b-hqq4": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *hqq(4))),
    "8b-hqq3": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *hqq(3))),
    "8b-hqq2": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *hqq(2))),
    "8b-dora": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *BNB_DORA)),
    "8b-hqq-dora": Case("grid_8b", 1, 4, 2048, 16, (NO_STREAM, *hqq(4, "dora"))),
    "70b20": Case("grid_70b_20_layers", 2, 2, 2048, 64, (STREAM,)),
    "70b20-hqq4": Case("grid_70b_20_layers", 2, 2, 2048, 64, (STREAM, *hqq(4))),
    "70b20-hqq3": Case("grid_70b_20_layers", 2, 2, 2048, 64, (STREAM, *hqq(3))),
    "70b20-hqq2": Case("grid_70b_20_layers", 2, 2, 2048, 64, (STREAM, *hqq(2))),
    "70b20-dora": Case("grid_70b_20_layers", 2, 2, 2048, 64, (STREAM, *BNB_DORA)),
    "70b20-hqq-dora": Case("grid_70b_20_layers", 2, 2, 2048, 64, (STREAM, *hqq(4, "dora"))),
    "70b-hqq3": Case("grid_70b", 2, 2, 2048, 64, hqq(3), host_gib=38.3),
    "70b-hqq2-one": Case("grid_70b", 1, 2, 2048, 64, hqq(2), host_gib=38.3),
}
# How long a context may be; minutes each, so only by name, with --steps 2.
LONG = {
    "70b-16k": Case("grid_70b", 2, 1, 16384, 64, host_gib=125),
    "70b-32k": Case("grid_70b", 2, 1, 32768, 64, host_gib=125),
    "8b-78k": Case("grid_8b", 1, 1, 78592, 32),
    "8b-128k": Case("grid_8b", 1, 1, 131072, 32),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("plan_grid.jsonl"), help="a line for each is appended here")
    parser.add_argument("--only", default="", help="names of configurations, with commas between")
    parser.add_argument("--gpus", type=int, default=None, help="only those that want so many")
    parser.add_argument("--first_gpu", type=int, default=0, help="of those that are taken, for several runs at once")
    parser.add_argument("--list", action="store_true", help="name the configurations and stop")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("train_options", nargs="*", help="after --: further options of train.py, for every run")
    asked = parser.parse_args()
    known = CASES | LONG
    wanted = [name for name in asked.only.split(",") if name] or list(CASES)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(known)}")
    wanted = [name for name in wanted if asked.gpus in (None, known[name].gpus)]
    if asked.list:
        print("\n".join(f"{name:12} {known[name]}" for name in wanted))
        return 0
    SHAPES.update(GRID_SHAPES)
    failed = [name for name in wanted if not _try(name, asked)]
    print(f"{len(wanted) - len(failed)} of {len(wanted)} ran" + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _try(name: str, asked: argparse.Namespace) -> bool:
    """Run one and append its line; says so where it failed, and the next one goes on."""
    start = time.time()
    try:
        line = row(name, (CASES | LONG)[name], asked.steps, asked.train_options, asked.first_gpu)
    except (SystemExit, Exception) as error:
        print(f"{name}: FAILED after {time.time() - start:.0f} s: {type(error).__name__}: {error}", flush=True)
        return False
    with asked.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{name}: {told(line)}, {time.time() - start:.0f} s in all", flush=True)
    return True


def row(name: str, case: Case, steps: int, more: Sequence[str], first_gpu: int = 0) -> dict[str, Any]:
    options = [f"--lora_rank={case.rank}", f"--host_memory_gib={case.host_gib}", *case.options, *more]
    asked = argparse.Namespace(
        shape=case.shape, gpus=case.gpus, cap_gib=case.cap_gib, batch_size=case.batch, context_length=case.context,
        steps=steps, peer_access=case.peer_access, train_options=options, first_gpu=first_gpu,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(asked, Path(scratch))
        planned = json.loads((Path(scratch) / "out" / "plan.json").read_text())
    measured.pop("losses")
    plan = planned["plan"]
    return {
        "name": name,
        "predicted": {"device_bytes": plan["device_bytes"], "host_bytes": plan["host_bytes"],
                      "seconds": plan["seconds"]},
        "measured": {"allocated_gib": measured.pop("gpu_allocated_gib"),
                     "reserved_gib": measured.pop("gpu_reserved_gib"), "host_gib": measured.pop("host_gib"),
                     "seconds": measured.pop("seconds_per_step")},
        "run": measured, "facts": planned["facts"], "rates": planned["rates"],
        "plan": {key: plan[key] for key in ("placement", "blocks", "head_resident", "staging", "parts")},
    }  # fmt: skip


def told(line: dict[str, Any]) -> str:
    """Predicted against measured, for the terminal."""
    predicted, measured = line["predicted"], line["measured"]
    gib, seconds = predicted["device_bytes"] / 2**30, predicted["seconds"]
    allocated, taken = measured["allocated_gib"], measured["seconds"]
    return (
        f"{gib:.2f} GiB predicted, {allocated:.2f} allocated ({gib / allocated - 1:+.1%}), "
        f"{measured['reserved_gib']:.2f} reserved; {seconds:.3f} s predicted, {taken:.3f} measured "
        f"({seconds / taken - 1:+.1%})"
    )


if __name__ == "__main__":
    sys.exit(main())
