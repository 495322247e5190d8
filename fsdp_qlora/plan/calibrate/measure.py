"""A machine's rates on the run's own shapes, each measured in some tens of milliseconds; for `calibrate.py`.

Everything is timed as it runs in a step: products on rows with a cache line's pitch, weights decoded by the codec,
links and collectives by all ranks at once.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.lora_wide import wide
from fsdp_qlora.memory.pinned import try_page_lock
from fsdp_qlora.memory.shared import HostStore
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.calibrate import timing
from fsdp_qlora.plan.calibrate.timing import seconds
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.torch_compat import all_gather, reduce_scatter

WARM_SECONDS = 0.2  # of products before anything is timed: a cold card clocks higher than a step lets it
MOST_TOKENS = 4096  # of products: beyond, the rates hardly change, and a slow card would take seconds
COPIED = 256 << 20  # bytes copied in device memory: several times the largest cache
PINNED = 64 << 20  # bytes of a copy between host and device
CROSSINGS = 12  # such copies timed: 15 ms at 55 GB/s, 65 ms at 12
PIECE = 64 << 20  # bytes that a rank sends into an all-gather, and gets from a reduce-scatter
COLLECTIVES = 4  # of those that are timed


def products(facts: Facts, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of a block's large products forward and backward, weighted as a block has them."""
    tokens = min(facts.usual_tokens, MOST_TOKENS)
    # (outputs, inputs, how many of that size a block has)
    shapes = [
        (facts.queries, facts.hidden, 2),
        (facts.intermediate, facts.hidden, 2),
        (facts.hidden, facts.intermediate, 1),
    ]
    like = torch.empty(0, dtype=dtype, device=device)
    flops, forward, backward = 0.0, 0.0, 0.0
    for i, (out, features, count) in enumerate(shapes):
        x, weight, y = (wide(*size, like).normal_() for size in ((tokens, features), (out, features), (tokens, out)))
        product = partial(torch.mm, x, weight.t(), out=y)
        if i == 0:
            _warm(product)
        flops += count * 2 * tokens * out * features
        forward += count * seconds(product)
        backward += count * seconds(partial(torch.mm, y, weight))
    return {"matmul_forward": flops / forward, "matmul_backward": flops / backward}


def _warm(call: Callable[[], object]) -> None:
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        for _ in range(5):
            call()
        torch.cuda.synchronize()


def memory(model: CausalModel, device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy in device memory, and of decoding the largest weight of a block."""
    source, target = (torch.zeros(COPIED // 4, dtype=torch.int32, device=device) for _ in range(2))
    copy = 2 * COPIED / seconds(partial(target.copy_, source))
    block = next(iter(model.blocks.values()))
    weight = max((m.weight for m in block.linears().values()), key=lambda w: math.prod(w.shape))
    entry, dtype = weight.home.layout.entries[weight.name], model.precision.compute
    parts = {
        name: torch.randint(0, 255, part.shape, dtype=part.dtype, device=device)
        if part.dtype is torch.uint8
        else torch.ones(part.shape, dtype=part.dtype, device=device)
        for name, part in entry.parts.items()
    }
    rows, columns = entry.shape
    out = wide(rows, columns, torch.empty(0, dtype=dtype, device=device))
    moved = sum(part.nbytes for part in entry.parts.values()) + out.numel() * dtype.itemsize
    return {"copy": copy, "dequantize": moved / seconds(lambda: entry.codec.decode(parts, entry.shape, dtype, out))}


def link(world: World) -> dict[str, float]:
    """Bytes per second between pinned host memory and this rank's GPU, all ranks of the node at the same time: from
    memory that they share, as streamed blocks come, to memory of their own, as kept activations go."""
    device = world.device
    source, target = (torch.zeros(PINNED, dtype=torch.uint8) for _ in range(2))
    try_page_lock(target)  # where the system refuses, the copies of a run are as slow as these
    try:
        source = HostStore(PINNED, world).take(PINNED).zero_()
    except UserError:  # a system that lets nobody share: nothing will be streamed
        try_page_lock(source)
    here, there = (torch.zeros(PINNED, dtype=torch.uint8, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    inward = (streams[0], here, source)
    outward = (streams[1], target, there)
    _cross([inward, outward], 1)
    world.barrier()
    (alone,) = _cross([inward], CROSSINGS)
    world.barrier()
    both_in, both_out = _cross([inward, outward], CROSSINGS)
    torch.cuda.synchronize(device)
    return {"h2d": alone, "h2d_both": min(both_in, alone), "d2h_both": both_out}


def _cross(ways: list[tuple[torch.cuda.Stream, Tensor, Tensor]], count: int) -> list[float]:
    """Bytes per second of `count` copies on each of some streams at once. ways: (stream, target, source)."""
    torch.cuda.synchronize()
    spans = []
    for stream, _, _ in ways:
        with torch.cuda.stream(stream):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            spans.append((start, end))
    for _ in range(count):
        for stream, target, source in ways:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
    for (_, end), (stream, _, _) in zip(spans, ways, strict=True):
        end.record(stream)
    torch.cuda.synchronize()
    return [count * PINNED / (start.elapsed_time(end) / 1e3) for start, end in spans]


def collectives(facts: Facts, dtype: torch.dtype, world: World) -> dict[str, float]:
    """Bytes per second received in an all-gather and a reduce-scatter over all ranks; how much longer a product takes
    beside a gather. All 0 for one rank, whose products nothing disturbs."""
    if world.size == 1:
        return {"gather": 0.0, "reduce": 0.0, "crowding": 1.0}
    mine = torch.zeros(PIECE // 4, device=world.device)
    whole = torch.zeros(world.size * PIECE // 4, device=world.device)
    received = PIECE * (world.size - 1)
    times = []
    for call in (lambda: all_gather(whole, mine), lambda: reduce_scatter(mine, whole)):
        call()
        world.barrier()
        times.append(timing.events(call, COLLECTIVES))
    slowest = max(row[0] for row in world.gather([times[0]]))
    return {
        "gather": received / times[0],
        "reduce": received / times[1],
        "crowding": _crowding(facts, dtype, world, lambda: all_gather(whole, mine, async_op=True), slowest),
    }


def _crowding(
    facts: Facts, dtype: torch.dtype, world: World, start_gather: Callable[[], dist.Work], gather_seconds: float
) -> float:
    """How many times longer products take while gathers run. gather_seconds: of one, the same number on every rank."""
    tokens = min(facts.usual_tokens, MOST_TOKENS)
    x = torch.zeros(tokens, facts.hidden, dtype=dtype, device=world.device)
    weight = torch.zeros(facts.hidden, facts.hidden, dtype=dtype, device=world.device)
    alone = seconds(lambda: x @ weight)
    count = max(3, min(200, int(2 * gather_seconds / alone)))
    world.barrier()
    works = [start_gather() for _ in range(4)]  # longer than the products, were these twice as slow
    beside = timing.events(lambda: x @ weight, count)
    for work in works:
        work.wait()
    torch.cuda.synchronize()
    return max(1.0, beside / alone)
