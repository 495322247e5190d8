"""Exchange by the collectives of torch.distributed."""

from torch import Tensor

from fsdp_qlora.exchange.base import Pending
from fsdp_qlora.torch_compat import all_gather, reduce_scatter


class Collectives:
    """The collectives of torch.distributed: NCCL between GPUs, gloo between CPUs."""

    widens = False

    def all_gather(self, whole: Tensor, shard: Tensor) -> Pending:
        work: Pending = all_gather(whole, shard, async_op=True)
        return work

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> Pending:
        work: Pending = reduce_scatter(shard, whole, async_op=True)
        return work

    def release_waits(self) -> None:
        pass
