"""Names of PyTorch that it keeps private or that change between versions, each with the versions it is for."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore as HashStore  # 2.11 to 2.13: torch.distributed has them, untyped
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store

# 2.11 and 2.12 have the second names only; 2.13 has the first, and warns of the second.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# 2.11 to 2.13: one kernel launch for a list of tensors. No public names exist.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm


def torchrun_patience() -> float:
    """Return the seconds after which torchrun kills its ranks once it has passed a signal on; 2.13 can be told them."""
    told = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    if not told.isdecimal():
        return 30.0
    from torch.distributed.launcher.api import LaunchConfig  # torchrun itself, which a rank does not need

    return float(told) if "shutdown_timeout" in LaunchConfig.__dataclass_fields__ else 30.0


# 2.11 to 2.13: cancels pending NCCL work. None where a version has no such function.
abort_process_group: Callable[[], None] | None = getattr(dist.distributed_c10d, "_abort_process_group", None)
