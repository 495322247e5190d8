"""Rows of a frozen embedding read where they lie: in pinned host memory, by the GPU itself, so that it holds no table.

A vocabulary of 128,256 by 8,192 is 2.1 GB in bf16, of which a step of 8,192 tokens uses 67 MB at most. The host could
gather those rows, but only after the ids came back to it, which is a wait for everything queued. A page-locked page is
in the GPU's own address space (CUDA's unified addressing), so a kernel there just loads from it: what crosses the link
is the rows asked for, about 1.3 ms of it at PCIe 5's 50 GB/s, in the order of the stream like any other kernel.

Triton takes such a tensor as it takes one of the device. Its launcher (3.6: C code generated per signature, 3.7:
`extractPointer` in backends/nvidia/driver.c) asks `cuPointerGetAttribute(CU_POINTER_ATTRIBUTE_DEVICE_POINTER)` for the
address the device knows the memory under, passes that one on, and refuses what has none ("cpu tensor?"). Memory from
torch's `pin_memory` and memory registered with `cudaHostRegister` both have one, also in the middle of it.

V vocabulary, H hidden.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty, launch, next_power_of_2, on_triton, tl, triton


def gather_rows(table_VH: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table_VH[ids], new, [..., H] of the table's dtype on the ids' device. No gradient: the table is frozen.

    ids: int64 [...], on a CPU or GPU. table_VH: bfloat16, float16 or float32 with stride 1 along H, on the ids' device
    or, for ids on a GPU, in page-locked host memory. Such a table must stay unchanged and alive until the GPU is done
    with what was queued: torch's allocator of pinned memory does not know of this reader.
    An id outside the table raises IndexError on a CPU and gives a row of NaN on a GPU, so that the run stops. Raises
    ValueError if the tensors are not as stated.
    """
    _check(table_VH, ids)
    if on_triton(ids):
        return _launch(table_VH, ids)
    out = empty((*ids.shape, table_VH.shape[1]), table_VH)
    torch.index_select(table_VH, 0, ids.flatten(), out=out.view(-1, table_VH.shape[1]))
    return out


def _check(table: torch.Tensor, ids: torch.Tensor) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, got {ids.dtype}")
    known = table.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if table.ndim != 2 or not known or table.stride(1) != 1 or table.requires_grad:
        raise ValueError(
            "an embedding's table must be a frozen [V, H] of bfloat16, float16 or float32 with stride 1 along H, "
            f"got {table.dtype} {tuple(table.shape)} with strides {table.stride()}"
            + (" that requires a gradient" if table.requires_grad else "")
        )
    if table.device != ids.device and not (ids.is_cuda and table.device.type == "cpu" and table.is_pinned()):
        raise ValueError(
            f"an embedding's table must be on {ids.device} as its ids are, or in pinned host memory for ids on a GPU, "
            f"got one on {table.device}"
        )


# ---- Triton: a program copies a row, or a tile of one that is longer


@triton.jit
def _gather_kernel(
    table_ptr, ids_ptr, out_ptr, n_vocabulary, row_stride, H: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):
    number = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    row = tl.load(ids_ptr + number)
    inside = (row >= 0) & (row < n_vocabulary)
    # Masked out, an id outside the table touches no memory at all.
    numbers = tl.load(table_ptr + row * row_stride + column, mask=(column < H) & inside, other=float("nan"))
    tl.store(out_ptr + number * H + column, numbers, mask=column < H)


@cost_of(_gather_kernel)
def _cost(table: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=2 * out.nbytes)


def _launch(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    hidden = table.shape[1]
    out = empty((*ids.shape, hidden), ids, table.dtype)
    tile = min(4096, next_power_of_2(hidden))
    tiles = cdiv(hidden, tile)
    if out.numel():
        launch(
            _gather_kernel, (ids.numel() * tiles,),
            table, ids.contiguous(), out, table.shape[0], table.stride(0),
            H=hidden, TILES=tiles, TILE=tile, num_warps=4,
        )  # fmt: skip
    return out
