"""GPU memory of a process: the part of PyTorch's allocator, and those of driver, libraries and other processes.

NVML counts the memory of a card as `nvidia-smi` shows it. Asked before this process has a context on any card, it says
what others hold; all that comes later is this process's. Without NVML others are taken to hold nothing.
"""

import ctypes
from contextlib import suppress
from typing import Any

import torch

from fsdp_qlora.errors import OR_ELSEWHERE, UserError
from fsdp_qlora.units import GIB, as_gib

_others: dict[str, int] = {}  # by the card's UUID, bytes in use before this process had a context


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def note_others() -> None:
    """Remember the bytes in use on each card, before CUDA is used."""
    _others.update(used_by_card())


def used_by_card() -> dict[str, int]:
    """Return UUID -> bytes in use, of every card of the machine; {} where NVML does not tell."""
    found: dict[str, int] = {}
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return {}
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            handle, memory, uuid = ctypes.c_void_p(), _Memory(), ctypes.create_string_buffer(96)
            failed = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            failed = failed or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            failed = failed or nvml.nvmlDeviceGetUUID(handle, uuid, len(uuid))
            if not failed:
                found[uuid.value.decode()] = memory.used
    return found


def outside_bytes(device: torch.device) -> int:
    """Return what this process holds on its card beside PyTorch's allocator: the context, libraries, their kernels."""
    free, total = torch.cuda.mem_get_info(device)
    properties: Any = torch.cuda.get_device_properties(device)
    card = f"GPU-{properties.uuid}"
    now = used_by_card()
    used = now[card] - _others[card] if card in now and card in _others else total - free
    return max(0, used - torch.cuda.memory_reserved(device))


def cap_gpu_memory(gib: float | None, device: torch.device) -> None:
    """Let PyTorch allocate no more than `gib` on a rank's GPU."""
    if gib is None:
        return
    if device.type != "cuda":
        raise UserError(f"gpu_memory_gib: {gib:g} has no effect without a GPU; omit it, {OR_ELSEWHERE}")
    total = torch.cuda.get_device_properties(device).total_memory
    if gib * GIB > total:
        raise UserError(f"gpu_memory_gib: {gib:g} is more than the card has ({as_gib(total)}); omit it or lower it")
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total, device)


def hold_to_card(gib: float | None, device: torch.device) -> None:
    """Let PyTorch allocate `gib` less what else this process holds on its GPU."""
    if gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = gib * GIB - outside_bytes(device)
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, allowed / total)), device)
