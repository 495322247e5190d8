"""docs/rigs.md: what models are expected to do on common rigs, as `train.py --plan_only true --plan_for` says it.

    python -m benchmarks.rigs > docs/rigs.md        some ten minutes, no GPU, no network

Nothing in it is measured. tests/plan/test_rigs.py types one row's command again and compares.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from fsdp_qlora.config.cards import Rig, rig_of
from fsdp_qlora.config.parse import parse
from fsdp_qlora.errors import UserError
from fsdp_qlora.plan.expected import COPY, link_rate
from fsdp_qlora.plan.plan import Plan
from fsdp_qlora.rig_plan import SYSTEM_GIB, Built, build_for, host_share, plan_built
from fsdp_qlora.units import GIB

RANK = 64
MACHINES = (64, 96, 128)  # GiB of host memory
TOKENS = 10e6  # of a run whose hours are told


@dataclass(frozen=True)
class Shape:
    """A model as its config.json has it (public, of November 2026), and the micro-batch that its table is for."""

    kind: type[PretrainedConfig]
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    context: int = 2048

    def config(self) -> PretrainedConfig:
        return self.kind(
            hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            max_position_embeddings=131072, tie_word_embeddings=False, architectures=[],
        )  # fmt: skip


# The head dimension is hidden / heads = 128 and no head is tied in all of them. Qwen 2.5 has biases on q, k and v.
SHAPES = {
    "Llama-3.3-70B": Shape(LlamaConfig, 8192, 28672, 80, 64, 8, 128256, batch=2),
    "Qwen2.5-72B": Shape(Qwen2Config, 8192, 29568, 80, 64, 8, 152064, batch=2),
    "Qwen2.5-32B": Shape(Qwen2Config, 5120, 27648, 64, 40, 8, 152064, batch=2),
    "Qwen2.5-14B": Shape(Qwen2Config, 5120, 13824, 48, 40, 8, 152064, batch=4),
    "Llama-3.1-8B": Shape(LlamaConfig, 4096, 14336, 32, 32, 8, 128256, batch=4),
}
LLAMA_2 = Shape(LlamaConfig, 8192, 28672, 80, 64, 8, 32000, batch=2)  # of what others published
# (rig, lanes of each card): a single card has 16; of two on a desktop board each has 8.
RIGS = (("1x3090", 16), ("1x4090", 16), ("1x5090", 16), ("2x3090", 16), ("2x3090", 8), ("2x4090", 16), ("2x4090", 8),
        ("2x5090", 16), ("2x5090", 8), ("4x3090", 16), ("4x3090", 8))  # fmt: skip
LENGTHS = ((8, 152), (2, 512), (2, 2048), (1, 4096), (1, 8192), (1, 16384))  # (batch, context)
LONG = (("Llama-3.3-70B", "2x4090", 16, 128), ("Qwen2.5-32B", "1x5090", 16, 96), ("Llama-3.1-8B", "1x4090", 16, 64))

HEAD = """# What to expect of a rig

<!-- Written by `python -m benchmarks.rigs > docs/rigs.md`. -->

**Expected, not measured**: none of these cards was asked. Rates are published ones of each card
(`fsdp_qlora/config/cards.py`, with sources) times what measured H100s and H200s reach of theirs
(`fsdp_qlora/plan/expected.py`, with derivations).
Rates so made for H100s and H200s predict their recorded runs within 15 % where the GPU or the link binds
(`tests/plan/test_expected.py`). For any other rig, on any machine, without a GPU:

    python train.py --model_name meta-llama/Llama-3.3-70B-Instruct --batch_size 2 --context_length 2048 \\
      --plan_only true --plan_for 2x4090 --link_gbps {half} --host_memory_gib {host}

On the rig itself leave `--plan_for` and `--link_gbps` out: then it is measured.

QLoRA, rank {rank} on all linears, AdamW, bf16, NF4 double-quantized, every position a label; batch x context are per
card. Columns: GiB of host memory that the machine has, of which the plan may take {hosts} (`--host_memory_gib`: nine
tenths of what the system leaves, {system} GiB counted for that). A cell: **tok/s** of all cards, hours for 10 M tokens,
GiB of host memory that the plan takes. GPU: GiB at the peak, the most of the row. Link: lanes of PCI Express for each
card, all at once: of 4.0 (3090, 4090) 16 lanes are {full} GB/s and 8 are {half}, of 5.0 (5090) twice that
(`--link_gbps`). What a desktop shows on a card takes memory that is not counted here.
"""


def main() -> int:
    for text in page():
        print(text, flush=True)
    return 0


def page() -> Iterator[str]:
    full, half = link_gbps(rig_of("4090"), 16), link_gbps(rig_of("4090"), 8)
    yield HEAD.format(
        rank=RANK, full=full, half=half, host=f"{host_share(96):g}", system=SYSTEM_GIB,
        hosts=" / ".join(f"{host_share(machine):g}" for machine in MACHINES),
    )  # fmt: skip
    for name, shape in SHAPES.items():
        yield f"## {name}, {shape.batch} x {shape.context}\n"
        yield (
            "| rig | link | "
            + " | ".join(f"{machine} GiB" for machine in MACHINES)
            + " | GPU |\n|---|---|---|---|---|---|"
        )
        for rig, lanes in RIGS:
            yield row(shape, rig, lanes)
        yield ""
    yield from lengths()
    yield from compared()


def row(shape: Shape, rig: str, lanes: int) -> str:
    """A line of a model's table."""
    plans = [planned(shape, rig, lanes, machine) for machine in MACHINES]
    peak = max((plan.device_bytes for plan in plans if plan is not None), default=0)
    cells = [cell(shape, rig, plan) for plan in plans]
    gpu = f"{peak / GIB:.1f}" if peak else ""
    return f"| {rig.replace('x', ' x ')} | x{lanes} | {' | '.join(cells)} | {gpu} |"


def cell(shape: Shape, rig: str, plan: Plan | None) -> str:
    if plan is None:
        return "does not fit"
    speed = tokens_per_second(shape, rig, plan)
    hours = TOKENS / speed / 3600
    return f"**{speed:,.0f}**, {hours:.{0 if hours >= 10 else 1}f} h, {plan.host_bytes / GIB:.0f}"


def tokens_per_second(shape: Shape, rig: str, plan: Plan) -> float:
    assert plan.seconds is not None
    return shape.batch * shape.context * rig_of(rig).count / plan.seconds


def options(shape: Shape, rig: str, lanes: int, machine: float) -> list[str]:
    """Of `train.py`, beside the model."""
    return [
        "--plan_only", "true", "--plan_for", rig, "--link_gbps", str(link_gbps(rig_of(rig), lanes)),
        "--host_memory_gib", f"{host_share(machine):g}", "--lora_rank", str(RANK),
        "--batch_size", str(shape.batch), "--context_length", str(shape.context),
    ]  # fmt: skip


def link_gbps(rig: Rig, lanes: int) -> float:
    """GB/s that are expected of so many lanes, as a user would give them."""
    return round(link_rate(rig.card) / 1e9 * lanes / 16, 1)


def planned(shape: Shape, rig: str, lanes: int, machine: float) -> Plan | None:
    """None where it does not fit."""
    config = parse(["--model_name", "shape", *options(shape, rig, lanes, machine)])
    try:
        return plan_built(_built(shape, rig), config, rig_of(rig)).plan
    except UserError as error:
        print(f"{rig} x{lanes} {machine}: {error}", file=sys.stderr)
        return None


@cache
def _built(shape: Shape, rig: str) -> Built:
    """The same for every link and host."""
    config = parse(["--model_name", "shape", *options(shape, rig, 16, MACHINES[0])])
    return build_for(config, rig_of(rig), shape.config())


def lengths() -> Iterator[str]:
    """Short and long rows, on a rig each."""
    yield "## Shorter and longer rows\n"
    names = [f"{name}, {rig.replace('x', ' x ')}, {machine} GiB" for name, rig, _, machine in LONG]
    yield f"| batch x context | {' | '.join(names)} |\n|---{'|---' * len(LONG)}|"
    for batch, context in LENGTHS:
        cells = []
        for name, rig, lanes, machine in LONG:
            shape = replace(SHAPES[name], batch=batch, context=context)
            cells.append(cell(shape, rig, planned(shape, rig, lanes, machine)))
        yield f"| {batch} x {context} | {' | '.join(cells)} |"
    yield ""


def compared() -> Iterator[str]:
    """Beside what others published."""
    speeds = {}
    for rig in ("2x4090", "2x3090"):
        for machine in (64, 128):
            plan = planned(LLAMA_2, rig, 16, machine)
            assert plan is not None
            speeds[rig, machine] = f"{tokens_per_second(LLAMA_2, rig, plan):,.0f}"
    yield f"""## Beside what was published

fsdp_qlora (Answer.AI, 2024) published Llama-2-70B, rank 64, 2 x 2048, CPU offload, more than 128 GB of host memory:

| tok/s | published for fsdp_qlora | expected here, 64 / 128 GiB of host memory, x16 |
|---|---|---|
| 2 x 4090 | 477 | {speeds["2x4090", 64]} / {speeds["2x4090", 128]} |
| 2 x 3090 | 178 | {speeds["2x3090", 64]} / {speeds["2x3090", 128]} |

The left column came from real cards, the right one from arithmetic: take it for what a run on such a rig will have to
show. On two H100s made to look like such a rig, where both programs were measured, the factor is 3
(`docs/performance.md`): what the peer loses to the link and the host weighs more there, for a 4090 has a fifth of an
H100's arithmetic, and that bounds both. What could prove these numbers wrong, most likely first: cards that clock lower
for power or heat, as a 5090 reported at three quarters of what is counted here; host memory that is slower than two
links (two channels of DDR4 give about 40 GB/s in all, both directions together); kernels tuned on Hopper, which are
taken to reach {COPY:.0%} of the memory bandwidth everywhere, and attention, taken to reach Hopper's share."""


if __name__ == "__main__":
    sys.exit(main())
