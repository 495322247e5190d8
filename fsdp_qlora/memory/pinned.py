"""Pinned (page-locked) host memory: exactly as much as asked for, registered with the driver once."""

import ctypes
import mmap
import weakref
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.units import as_gib

PAGE = 4096  # bytes; what is page-locked must not share a page with something else that is
POPULATE_STEP = 64 << 20  # bytes asked of the kernel at once
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23  # Linux 5.14 knows the second; where it does not, the first write does it


def large_pages(nbytes: int) -> Tensor:
    """Return uint8 [nbytes], in pages of 2 MiB where the system has any: such are pinned in about half the time
    (docs/performance.md)."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def populate(address: int, nbytes: int) -> bool:
    """Make the kernel fill in fresh pages, without Python's lock; return False where it does not know how.

    In steps, between which other threads can change the process's address space."""
    for offset in range(0, nbytes, POPULATE_STEP):
        if _advise()(address + offset, min(POPULATE_STEP, nbytes - offset), MADV_POPULATE_WRITE) != 0:
            return False
    return True


def ask_large_pages(address: int, nbytes: int) -> None:
    """Make the kernel use pages of 2 MiB there, where it has any."""
    _advise()(address, nbytes, MADV_HUGEPAGE)


@cache
def _advise() -> Any:
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise


def page_lock(tensor: Tensor, what: str) -> Tensor:
    """Pin the memory that `tensor` has. PyTorch's own pinned allocator would make a copy rounded up to a power of two.

    what: the option or thing it is for, in the message. Raises UserError where the system refuses."""
    status = try_page_lock(tensor)
    if status != 0:
        raise UserError(
            f"{what}: the system refuses to page-lock {as_gib(tensor.nbytes, 2)} more of host memory "
            f"(CUDA error {status}); free some memory or raise `ulimit -l`"
        )
    return tensor


def try_page_lock(tensor: Tensor) -> int:
    """Pin the memory that `tensor` has; return 0, or CUDA's error code where the system refuses.

    It is unpinned with the last tensor that has the memory. Otherwise the addresses, once they are used again, would
    still be the old pages to the driver: copies of other tensors would bring their bytes, or fail."""
    address = tensor.data_ptr()
    status = register(address, tensor.nbytes)
    if status == 0:
        weakref.finalize(tensor.untyped_storage(), unregister, address).atexit = False  # then the process ends it
    return status


def register(address: int, nbytes: int) -> int:
    """Pin memory; return 0, or CUDA's error code. The caller must `unregister` it before it is freed."""
    status = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
    if status != 0:
        _forget_error()
    return status


def unregister(address: int) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
        _forget_error()


def _forget_error() -> None:
    """Clear the error that the runtime keeps of a refused call: the check after the next kernel would raise it."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
