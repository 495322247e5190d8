"""For a script that opens one process group after the other in one launch of torchrun.

A group leaves its addresses in torchrun's store, where the next one of the same processes would find them: so each has
a part of that store to itself.
"""

import os

import torch.distributed as dist

from fsdp_qlora.distributed import group

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
_STORE = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def meet_at(name: str) -> None:
    """The next group of these processes meets in the part of that name."""
    group.store_of = lambda launch: dist.PrefixStore(name, _STORE)
