"""Plans of three kinds of block, as it takes to use up both the GPU's and the host's memory, and two more for the rest.

Where arithmetic bounds a step its seconds, the GPU's bytes and the host's are sums over blocks, so the best mix is a
corner of a linear program: three kinds, whose counts three equations give. Rounding, the link and the order of things
are then seen to by moving single blocks from one kind to another as long as that helps.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from operator import add

from fsdp_qlora.plan.candidate import Kind, Kinds
from fsdp_qlora.plan.inputs import KEEP

MOVES = ((10, 3), (3, 3), (1, 3), (1, 5))  # (blocks moved at once, of 80; kinds there may be): the last fills gaps
FASTER = 1 - 1e-4  # a move that gains less is none


@dataclass(frozen=True)
class Cost:
    """Of a block of a kind: seconds of arithmetic, bytes that it keeps on the GPU, bytes in the node's host memory."""

    seconds: float
    gpu: int
    host: int


def corners(costs: Mapping[Kind, Cost], layers: int, gpu: int, host: int) -> list[Counter[Kind]]:
    """Counts of three kinds that use up `gpu` and `host` bytes but for less than a block's, fastest first."""
    found = []
    for kinds in combinations(costs, 3):
        a, b, c = sorted((costs[kind] for kind in kinds), key=lambda cost: cost.gpu + cost.host)
        by_cost = {id(costs[kind]): kind for kind in kinds}
        # a is the cheapest: n_b and n_c are what the memory beyond layers * a pays for.
        gpu_left, host_left = gpu - layers * a.gpu, host - layers * a.host
        gpu_b, gpu_c, host_b, host_c = b.gpu - a.gpu, c.gpu - a.gpu, b.host - a.host, c.host - a.host
        determinant = gpu_b * host_c - gpu_c * host_b
        if determinant == 0:
            continue
        n_b = int((gpu_left * host_c - gpu_c * host_left) / determinant // 1)
        n_c = int((gpu_b * host_left - gpu_left * host_b) / determinant // 1)
        if n_b > 0 and n_c > 0 and n_b + n_c < layers:
            seconds = (layers - n_b - n_c) * a.seconds + n_b * b.seconds + n_c * c.seconds
            counts = {by_cost[id(a)]: layers - n_b - n_c, by_cost[id(b)]: n_b, by_cost[id(c)]: n_c}
            found.append((seconds, Counter(counts)))
    return [counts for _, counts in sorted(found, key=lambda one: one[0])]


def edges(costs: Mapping[Kind, Cost], layers: int, gpu: int, host: int) -> list[Counter[Kind]]:
    """Counts of two kinds that use up one of the memories but for less than a block's, the other having room, fastest
    first: corners where more memory of the other sort would help nobody."""
    found = []
    for first, second in combinations(costs, 2):
        a, b = costs[first], costs[second]
        for left, more in ((gpu - layers * a.gpu, b.gpu - a.gpu), (host - layers * a.host, b.host - a.host)):
            if more == 0:
                continue
            # As many of the second kind as there is room for, or as few as bring the rest under the limit.
            n_b = left // more if more > 0 else -(left // -more)
            n_a = layers - n_b
            if n_a > 0 and n_b > 0 and n_a * a.gpu + n_b * b.gpu <= gpu and n_a * a.host + n_b * b.host <= host:
                found.append((n_a * a.seconds + n_b * b.seconds, Counter({first: n_a, second: n_b})))
    return [counts for _, counts in sorted(found, key=lambda one: one[0])]


def climb(start: Kinds, seconds: float, kinds: Sequence[Kind], timed: Callable[[Kinds, float], float]) -> Kinds:
    """The best that single moves lead to, large moves first. timed: seconds of blocks of such kinds, infinitely many
    where they do not fit; with a limit, beyond which they do not matter."""
    layers = len(start)
    for stride, most in dict.fromkeys((max(1, stride * layers // 80), most) for stride, most in MOVES):
        while True:
            best, least = start, seconds * FASTER
            for changed in _neighbours(start, kinds, stride, most):
                found = timed(changed, least)
                if found < least:
                    best, least = changed, found
            if best is start:
                break
            start, seconds = best, least
    return start


def _neighbours(start: Kinds, kinds: Sequence[Kind], stride: int, most: int) -> Iterator[Kinds]:
    counts = Counter(start)
    for source in list(counts):
        moved = min(stride, counts[source])
        for target in kinds:
            changed = counts - Counter({source: moved}) + Counter({target: moved})
            if target != source and len(changed) <= most:
                yield blend(changed, kinds)


def blend(counts: Mapping[Kind, int], kinds: Sequence[Kind]) -> Kinds:
    """Each kind spread as evenly as the others let it. But the last block is of those that keep most on the GPU: its
    backward, when all the others' is there too, then makes least again."""
    return _blended(tuple((kind, counts[kind]) for kind in kinds if counts.get(kind)))


@lru_cache(1 << 14)
def _blended(counts: tuple[tuple[Kind, int], ...]) -> Kinds:
    layers = sum(count for _, count in counts)
    shares, due, blocks = [count for _, count in counts], [0] * len(counts), []
    for _ in range(layers):
        due = list(map(add, due, shares))
        behind = due.index(max(due))
        due[behind] -= layers
        blocks.append(counts[behind][0])
    most = max(dict.fromkeys(blocks), key=lambda kind: (not kind[1], KEEP.index(kind[0])))
    last = layers - 1 - blocks[::-1].index(most)
    return (*blocks[:last], *blocks[last + 1 :], most)
