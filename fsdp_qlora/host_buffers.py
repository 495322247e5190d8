"""Page-locked host memory: exactly as much as asked for, registered with the driver once."""

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.units import GIB


def page_lock(tensor: Tensor, what: str) -> Tensor:
    """Pin the memory that `tensor` has. PyTorch's own pinned allocator would make a copy rounded up to a power of two.

    what: the option or thing it is for, in the message. Raises UserError where the system refuses."""
    nbytes = tensor.numel() * tensor.element_size()
    status = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes, 0))
    if status != 0:
        raise UserError(
            f"{what}: the system refuses to page-lock {nbytes / GIB:.2f} GiB more of host memory "
            f"(CUDA error {status}); free some memory or raise `ulimit -l`"
        )
    return tensor
