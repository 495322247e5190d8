"""What each placement of the frozen base costs: bytes on the GPU and in host memory, and what crosses the link."""

from dataclasses import dataclass

from fsdp_qlora.plan.candidate import Homes, Placed
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.rates import Rates

GATHERED = 4  # blocks that FSDP2 holds whole at once: in use, two gathered ahead, one being copied out of its gather
PREFETCH = 2  # blocks that FSDP2 gathers ahead: one crosses from the host while the one before it is gathered
HEAD_COPIES = 2  # of a gathered head or embedding: as it arrives and as it is read
STAGING = (3, 2, 4)  # buffers tried: one in use, one ahead, and one more so that the link need not wait for a block


@dataclass(frozen=True)
class PlacementCost:
    """A placement whose ranks read frozen bytes that each has for itself: every block resident."""

    name: Placed
    where: str  # for the user, {place}: GPU or rank
    unplaced: float  # what the allocator reserves over what is allocated, where no arena is
    shards: bool = False  # ranks have a share each, and gather units before they use them
    streams: bool = False  # units that are not resident come from host memory

    def forms(self, facts: Facts) -> list[tuple[bool, int]]:
        """Return what there is to choose: (whether the head is resident, staging buffers)."""
        return [(True, 0)]

    def resident_bytes(self, facts: Facts, homes: Homes) -> int:
        """Return the frozen bytes that stay on a GPU."""
        blocks = homes.residents * facts.block_bytes
        embedding = 0 if facts.embedding_on_host else facts.embedding_bytes
        return blocks + self.resident_head_bytes(facts, homes) + embedding + facts.rest_bytes

    def resident_head_bytes(self, facts: Facts, homes: Homes) -> int:
        return facts.head_bytes if homes.head_resident else 0

    def moving_bytes(self, facts: Facts, homes: Homes) -> int:
        """Return the bytes of units on their way to a GPU or gathered there."""
        return 0

    def gathered_head_bytes(self, facts: Facts) -> int:
        """Return what the head needs beyond `moving_bytes` while it is gathered: no block is then."""
        return 0

    def host_bytes(self, facts: Facts, homes: Homes) -> int:
        """Return the frozen bytes in host memory of a node, but for the embedding."""
        return 0

    def embeddings(self, facts: Facts) -> int:
        """Return how many copies of the embedding a node's host memory has, where it is there."""
        return facts.local_ranks

    def gather_seconds(self, facts: Facts, rates: Rates) -> float:
        """Return the seconds until a block is whole; 0.0 where nothing is gathered."""
        return 0.0

    def gather_head_seconds(self, facts: Facts, rates: Rates) -> float:
        """Return the seconds to gather the head, and an embedding that is not in host memory, when they are used."""
        return 0.0

    def passes(self, facts: Facts) -> int:
        """Return in how many of a micro-batch's two passes blocks are gathered."""
        return 0

    def arrival_seconds(self, facts: Facts, rates: Rates, homes: Homes) -> float:
        """Return the seconds of a micro-batch in which frozen bytes come to the GPU."""
        gathers = self.passes(facts) * facts.layers * self.gather_seconds(facts, rates)
        return gathers + self.gather_head_seconds(facts, rates)


class Streamed(PlacementCost):
    """The base in host memory, once per node; what is not resident is copied through staging buffers."""

    def forms(self, facts: Facts) -> list[tuple[bool, int]]:
        heads = (True, False) if facts.head_bytes else (True,)
        return [(head, staging) for head in heads for staging in STAGING]

    def moving_bytes(self, facts: Facts, homes: Homes) -> int:
        streamed = homes.streamed + (not homes.head_resident)
        return min(homes.staging, streamed) * staged_bytes(facts, homes)

    def host_bytes(self, facts: Facts, homes: Homes) -> int:
        head = 0 if homes.head_resident else facts.head_bytes
        return facts.block_bytes * homes.streamed + head

    def embeddings(self, facts: Facts) -> int:
        return 1

    def arrival_seconds(self, facts: Facts, rates: Rates, homes: Homes) -> float:
        head = not homes.head_resident  # in a buffer that would have kept a block where the passes turn round
        moved = max(0, 2 * (homes.streamed - homes.staging) + head) * facts.block_bytes
        return (moved + (facts.head_bytes if head else 0)) / rates.h2d


class Sharded(PlacementCost):
    """Each rank has its share of the base on its GPU."""

    def resident_bytes(self, facts: Facts, homes: Homes) -> int:
        return -(-_shared_bytes(facts) // facts.shards) + facts.rest_bytes

    def resident_head_bytes(self, facts: Facts, homes: Homes) -> int:
        return 0

    def moving_bytes(self, facts: Facts, homes: Homes) -> int:
        """Return the bytes of blocks that are whole at once."""
        return (GATHERED if facts.reshard else facts.layers) * facts.block_bytes

    def gathered_head_bytes(self, facts: Facts) -> int:
        blocks = GATHERED * facts.block_bytes if facts.reshard else 0
        return HEAD_COPIES * (facts.head_bytes or facts.embedding_bytes) - blocks

    def gather_seconds(self, facts: Facts, rates: Rates) -> float:
        received = self._received_bytes(facts)
        return received / rates.gather if received else 0.0

    def gather_head_seconds(self, facts: Facts, rates: Rates) -> float:
        embedding = facts.embedding_bytes * (1 if facts.head_bytes else 2)
        tables = facts.head_bytes + (0 if facts.embedding_on_host else embedding)
        return self.gather_seconds(facts, rates) * tables / facts.block_bytes

    def passes(self, facts: Facts) -> int:
        return 2 if facts.reshard else 1

    def _received_bytes(self, facts: Facts) -> float:
        """Return the bytes that a rank receives to have a block whole."""
        return facts.block_bytes * (facts.shards - 1) / facts.shards


class ShardedOffload(Sharded):
    """Each rank has its share of the base in host memory."""

    def resident_bytes(self, facts: Facts, homes: Homes) -> int:
        return facts.rest_bytes

    def host_bytes(self, facts: Facts, homes: Homes) -> int:
        return _shared_bytes(facts) * facts.local_ranks // facts.shards

    def gather_seconds(self, facts: Facts, rates: Rates) -> float:
        """Offloaded shards come over the link that the others' bytes use as well, in both directions where there is no
        peer access."""
        through_host = self._received_bytes(facts) if rates.gather < rates.h2d else 0.0
        by_link = (facts.block_bytes / facts.shards + through_host) / rates.h2d_both
        return max(super().gather_seconds(facts, rates), by_link)


def staged_bytes(facts: Facts, homes: Homes) -> int:
    """Return the bytes of a staging buffer: as many as the largest streamed unit has."""
    units = [facts.block_bytes] if homes.streamed else []
    units += [] if homes.head_resident else [facts.head_bytes]
    return max(units, default=0)


def _shared_bytes(facts: Facts) -> int:
    """Return the frozen bytes that are divided among ranks."""
    embedding = 0 if facts.embedding_on_host else facts.embedding_bytes
    return facts.layers * facts.block_bytes + facts.head_bytes + embedding


# In the order of how much there is to move; of the fastest that are nearly equal the first is taken.
PLACEMENT_COSTS: dict[Placed, PlacementCost] = {
    cost.name: cost
    for cost in (
        PlacementCost("replicate", "the frozen base on every {place}, every block resident", 1.05),
        Sharded(
            "shard", "each {place} has its share of the frozen base, blocks gathered ahead of use", 1.10, shards=True
        ),
        Streamed(
            "stream", "the frozen base in host memory, once per node, blocks copied ahead of use", 1.03, streams=True
        ),
        ShardedOffload(
            "shard_offload",
            "each rank has its share of the frozen base in host memory, blocks gathered ahead of use",
            1.10,
            shards=True,
        ),
    )
}
