"""Number of ranks that hold one copy of the frozen base between them."""

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError


def shard_count(options: MemoryOptions, world: World) -> int:
    """Return how many ranks hold one copy between them. Raises UserError if the ranks cannot be divided so."""
    if not options.sharding_strategy.startswith("hybrid"):
        return world.size
    shards = world.local_size if options.hybrid_shard_size == -1 else options.hybrid_shard_size
    if world.size % shards:
        raise UserError(
            f"hybrid_shard_size: {world.size} ranks cannot be divided into groups of {shards}; "
            "use a divisor of the number of ranks"
        )
    return shards
