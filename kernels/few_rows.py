"""A few rows times a matrix of codes: y = x W^T + b + xa B^T, how the work is divided and how a product ends.

With one row a matrix product is a pass over the matrix: 4-bit codes are a quarter of what a dequantized copy is, and
writing that and reading it back would move nine times as much. Tensor cores multiply 8 rows in the time of one, so the
pass costs about the same for all few rows; the caller knows up to how many it pays.

A codec's kernel (`nf4_few_rows.py`, `hqq_few_rows.py`) decodes tiles of OUTPUTS rows of W into registers, rounded to
x's dtype exactly as its dequantizer rounds, and multiplies them from the left: W is the wide operand, x^T the narrow
one. Tried on paper and left: plain multiply-adds need x in float32 once more for every output (8 bytes of x for a byte
of codes, from the cache), which took 9.9 ms a step of 8B where the codes take 1.3.

A matrix of 4096 outputs has 64 tiles of them, a card 100 multiprocessors and more: so a row's features are divided
among SPLITS programs. The last to finish sums their parts, in their order, so the same call gives the same bits.

M rows, I in features, O out features, R the adapter's columns.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost
from fsdp_qlora.kernels.device import cdiv, empty, launch, next_power_of_2, on_triton, tl, triton

MOST_ROWS = 64  # of one program: its x^T and sums stay in registers
OUTPUTS = 64  # out features of a program's tile
PROGRAMS = 4  # for each multiprocessor: enough loads in flight to keep the memory busy
FEWEST_STEPS = 4  # of a program, below which starting it costs more than it brings
MOST_RANK = 128  # columns of the adapter in one product: 512 take 104 KiB of shared memory, a gaming card has 99


def on_tensor_cores(like: torch.Tensor) -> bool:
    """Tell whether such kernels run on like's device and in its dtype.

    Tensor cores are for 16 bits. In float32 their one long sum per number is four times as far off as cuBLAS'."""
    return on_triton(like) and like.dtype.itemsize == 2


def launch_few_rows(
    kernel: Any,
    x: torch.Tensor,
    stored: Sequence[torch.Tensor],
    out: torch.Tensor,
    tile: int,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    b: torch.Tensor | None,
    **form: Any,
) -> None:
    """Launch a codec's kernel for all rows of x, `MOST_ROWS` at a time.

    x, out, bias, xa, b: as `nf4_few_rows` has them. stored: the kernel's pointers between x's and the bias's. tile: in
    features of a step. form: the kernel's own constants. Raises ValueError for what does not fit."""
    rows, width = x.shape
    outputs = out.shape[1]
    if not _fit(x, out, bias, xa, b):
        others = [None if t is None else (*t.shape, *t.stride(), t.dtype) for t in (bias, xa, b)]
        raise ValueError(
            f"no product of {rows} rows of {width} into {tuple(out.shape)} with {others} as bias, xa and b"
        )
    rank = 0 if b is None else b.shape[1]
    tiles = cdiv(outputs, OUTPUTS)
    steps, splits = _division(tiles, cdiv(width, tile), x.device)
    arrivals = none = _arrivals(x.device, tiles)  # none: stands where the kernel reads nothing
    for first in range(0, rows, MOST_ROWS):
        count = min(MOST_ROWS, rows - first)
        parts = empty((splits, outputs, count), x, torch.float32) if splits > 1 else none
        launch(
            kernel, (tiles, splits),
            x[first:], *stored, none if bias is None else bias, none if xa is None else xa[first:],
            none if b is None else b, out[first:], parts, arrivals, count, outputs, 0 if xa is None else xa.stride(0),
            out.stride(0), I=width, BIAS=bias is not None, R=rank,
            R_TILE=min(MOST_RANK, max(16, next_power_of_2(rank))), ROWS=max(8, next_power_of_2(count)), OUTPUTS=OUTPUTS,
            STEPS=steps, SPLITS=splits, **form, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _fit(
    x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, xa: torch.Tensor | None, b: torch.Tensor | None
) -> bool:
    """Tell whether these are as the kernel reads and writes them, which knows of each a pointer and a stride."""
    outputs = out.shape[1]
    fits = out.shape[0] == x.shape[0] and out.stride(1) == 1 and out.dtype == x.dtype and x.is_contiguous()
    if bias is not None:
        fits = fits and bias.shape == (outputs,) and bias.is_contiguous()
    if xa is None or b is None:
        return fits and xa is b
    if xa.shape[0] != x.shape[0] or b.shape != (outputs, xa.shape[1]) or not xa.dtype == b.dtype == x.dtype:
        return False
    return fits and xa.stride(1) == 1 and b.is_contiguous()


def cost(*args: Any, **_: Any) -> Cost:
    """Return what a codec's kernel costs: each of its tensors is read or written once."""
    return Cost(bytes=sum(x.nbytes for x in args if isinstance(x, torch.Tensor)))


def _division(tiles: int, steps: int, device: torch.device) -> tuple[int, int]:
    """Return (steps of a program, programs among which the steps of a tile are divided)."""
    wanted = cdiv(PROGRAMS * _multiprocessors(device), tiles)
    each = min(steps, max(FEWEST_STEPS, cdiv(steps, wanted)))
    return each, cdiv(steps, each)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _arrivals(device: torch.device, tiles: int) -> torch.Tensor:
    """Return int32 [tiles], zero between two launches: how many parts of a tile are done.

    Made outside a graph's capture: there the zeros would be written by its replays alone."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "the first call of a shape, captured"
    return torch.zeros(tiles, dtype=torch.int32, device=device)


@triton.jit
def finish(
    summed,  # float32 [OUTPUTS, ROWS]
    outputs, row, live, known,  # which out features and rows these are, and which of them there are
    bias_ptr, xa_ptr, b_ptr, out_ptr,
    parts_ptr,  # float32 [SPLITS, O, rows]
    arrivals_ptr,  # int32, one for each tile
    rows, O, xa_stride, out_stride,
    BIAS: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sum the parts of all programs of a tile, add bias and adapter, and write the tile: the last program does."""
    split = tl.program_id(1)
    tile = live[:, None] & known[None, :]
    is_last = True
    if SPLITS > 1:
        at_part = outputs.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(parts_ptr + split.to(tl.int64) * O * rows + at_part, summed, mask=tile)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(arrivals_ptr + tl.program_id(0), 0)
            summed = tl.zeros_like(summed)
            for _ in range(SPLITS):
                summed += tl.load(parts_ptr + at_part, mask=tile, other=0.0, cache_modifier=".cg")
                at_part += O * rows
    if is_last:
        if BIAS:
            summed += tl.load(bias_ptr + outputs, mask=live, other=0.0).to(tl.float32)[:, None]
        for first_r in tl.static_range(0, R, R_TILE):
            r = first_r + tl.arange(0, R_TILE)
            b_at = outputs.to(tl.int64)[:, None] * R + r[None, :]
            b = tl.load(b_ptr + b_at, mask=live[:, None] & (r < R)[None, :], other=0.0)
            xa = tl.load(
                xa_ptr + row[None, :] * xa_stride + r[:, None], mask=known[None, :] & (r < R)[:, None], other=0.0
            )
            summed = tl.dot(b, xa, summed, input_precision="ieee")
        tl.store(out_ptr + row[None, :] * out_stride + outputs[:, None], summed.to(out_ptr.dtype.element_ty), mask=tile)
