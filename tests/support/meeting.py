"""For a script that opens one process group after the other in one launch of torchrun.

A group leaves its addresses in torchrun's store, where the next one of the same processes would find them: so each has
a part of that store to itself.
"""

import os
from functools import partial

import torch.distributed as dist

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
_STORE = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
_OPEN = dist.init_process_group


def meet_at(name: str) -> None:
    """The next group of these processes meets in the part of that name."""
    dist.init_process_group = partial(_OPEN, store=dist.PrefixStore(name, _STORE), rank=RANK, world_size=SIZE)
