"""LoRA inside the base product: the adapter rides along as a few more columns of matrices that are multiplied anyway.

    y    = x W^T + s x A^T B^T      = [x | s x A^T] [W | B]^T
    d_x  = d_y W + d_xa A           = [d_y | d_xa] [W ; A],        d_xa = s d_y B

A frozen weight is decoded into scratch before each use, so B and A can be laid beside and below it for next to nothing,
and x is written into a buffer with room for R more columns by whoever computes it. Then the adapter costs R/H more
arithmetic (0.4 % at rank 16) instead of another pass over the output: at 8B shape and 8,192 tokens that pass reads and
writes 0.5 GB for gate alone. The sum is also rounded once, where separate products round twice.

All linears of one input are one product: their weights lie one below the other (a `Projection` of several adapters),
each B beside the rows of its own outputs, with zeros around it:

    [ Wq  Bq  0   0  ]
    [ Wk  0   Bk  0  ]   [O, H + R]
    [ Wv  0   0   Bv ]
    [ Aq             ]
    [ Ak             ]   [R, H]
    [ Av             ]

One decoded matrix serves forward (its first O rows), the input's gradient (its first H columns) and d_xa (its last R).
So a block launches few kernels, and d_x is a sum that is rounded once.

A projection's factor of its outputs (`dora.py`) is in the weight and in the B's that are laid beside it, so all else is
as without one. Gradients of B are those of the B's times their factors then.

What is kept of the adapter's middle, `xs`, is s x A^T: its gradient formulas then need no further scaling.
Everything here is outside autograd, for functions that hold more than linears. Adapters of one input share a scale.

T tokens, H in features, O out features, R the sum of the ranks of an input's adapters, rounded up to 8 for alignment.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty, launch, next_power_of_2, on_triton, tl, triton
from fsdp_qlora.kernels.dora import scale_rows_
from fsdp_qlora.kernels.dropout import dropout, dropout_add_
from fsdp_qlora.kernels.glu_lora import MOST_RANK, Pair, glu_backward_lora_
from fsdp_qlora.kernels.lora import Projection

ALIGN = 8  # numbers: 16 bytes in 16-bit dtypes, which fast matrix products ask of a row's start
PITCH = 64  # numbers from row to row: a multiple of this, 128 bytes, for whole cache lines
Room = Callable[[int, int], torch.Tensor]  # (rows, columns) -> scratch as of `wide`, good until it is asked for again


def wide(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised [rows, columns] with rows that begin on whole cache lines."""
    return empty((rows, -(-columns // PITCH) * PITCH), like)[:, :columns]


def extra(projection: Projection) -> int:
    """R, the columns that the adapters of an input need beside it."""
    return room_for(_ranks(projection))


def room_for(ranks: Sequence[int]) -> int:
    """R of adapters of these ranks."""
    return -(-sum(ranks) // ALIGN) * ALIGN


def lay(projection: Projection, out_features: int, in_features: int, room: Room) -> torch.Tensor:
    """[O + R, H + R], in scratch: the weight decoded, the B's beside it and the A's below. The corner is never read."""
    beside = extra(projection)
    laid = room(out_features + beside, in_features + beside)
    projection.weight(laid[:out_features, :in_features])
    if not beside:
        return laid
    if on_triton(laid):
        _launch(projection, laid, out_features, in_features)
        if projection.factor is not None:
            scale_rows_(laid[:out_features, in_features:], projection.factor)
        return laid
    b_OR, a_RH = laid[:out_features, in_features:].zero_(), laid[out_features:, :in_features].zero_()
    at = 0
    for adapter, rank in zip(projection.adapters, _ranks(projection), strict=True):
        b_OR[adapter.rows, at : at + rank] = adapter.b
        a_RH[at : at + rank] = adapter.a
        at += rank
    if projection.factor is not None:
        scale_rows_(b_OR, projection.factor)
    return laid


def adapt_(x_wide: torch.Tensor, projection: Projection, laid: torch.Tensor, *, p: float, seed: int) -> torch.Tensor:
    """Fill x_wide [T, H + R] beside x, its first H columns, with xs; returns that view [T, R]."""
    features = x_wide.shape[1] - extra(projection)
    x, xs = x_wide[:, :features], x_wide[:, features:]
    if projection.adapters:
        a_RH = laid[laid.shape[0] - xs.shape[1] :, :features]
        x = dropout(x.contiguous(), p, seed) if p else x
        torch.addmm(xs, x, a_RH.t(), beta=0, alpha=_scale(projection), out=xs)
    return xs


def project_wide(
    x_wide: torch.Tensor,
    projection: Projection,
    laid: torch.Tensor,
    out: torch.Tensor,
    *,
    plus: torch.Tensor | None = None,
) -> None:
    """Write the projection of x_wide [T, H + R], adapted already, to out [T, O], stride 1 along O.

    plus: [T, O] added to the output of a projection without a bias (a residual)."""
    assert plus is None or projection.bias is None, "an output takes a bias or a residual"
    summand, weight = projection.bias if plus is None else plus, laid[: out.shape[1]]
    if summand is None:
        torch.mm(x_wide, weight.t(), out=out)
    else:
        torch.addmm(summand, x_wide, weight.t(), out=out)


def gradients_of_b_wide(
    d_out: torch.Tensor, d_xa: torch.Tensor, xs: torch.Tensor | None, projection: Projection, laid: torch.Tensor
) -> list[torch.Tensor]:
    """[d_b of each adapter], from d_out [T, O]; writes d_xa [T, R], the gradient of x A^T, on the way."""
    gradient_of_xa_wide(d_out, d_xa, projection, laid)
    return products_of_b(d_out, xs, projection)


def gradient_of_xa_wide(d_out: torch.Tensor, d_xa: torch.Tensor, projection: Projection, laid: torch.Tensor) -> None:
    """Writes d_xa [T, R], the gradient of x A^T, from d_out [T, O]."""
    if projection.adapters:
        b_OR = laid[: d_out.shape[1], laid.shape[1] - d_xa.shape[1] :]
        torch.addmm(d_xa, d_out, b_OR, beta=0, alpha=_scale(projection), out=d_xa)


def products_of_b(d_out: torch.Tensor, xs: torch.Tensor | None, projection: Projection) -> list[torch.Tensor]:
    """[d_b of each adapter] from d_out [T, O] and xs [T, R], which may be None where there is no adapter."""
    d_bs, at = [], 0
    for adapter, rank in zip(projection.adapters, _ranks(projection), strict=True):
        assert xs is not None
        d_b = empty(adapter.b.shape, d_out)
        torch.mm(d_out[:, adapter.rows].t(), xs[:, at : at + rank], out=d_b)
        d_bs.append(d_b)
        at += rank
    return d_bs


def gradients_of_a_wide(
    d_xa: torch.Tensor, x: torch.Tensor, projection: Projection, *, p: float, seed: int
) -> list[torch.Tensor]:
    """[d_a of each adapter] in one product over the input x [T, H]."""
    ranks = _ranks(projection)
    if not ranks:
        return []
    if p:
        x = dropout(x.contiguous(), p, seed)
    stacked = empty((sum(ranks), x.shape[1]), x)
    return list(torch.mm(d_xa[:, : sum(ranks)].t(), x, out=stacked).split(ranks))


def gradient_of_input_wide(
    d_out_wide: torch.Tensor, projection: Projection, laid: torch.Tensor, *, p: float, seed: int
) -> torch.Tensor:
    """d_x [T, H], new, from d_out_wide [T, O + R] with d_xa in it."""
    beside = extra(projection)
    matrix = laid[:, : laid.shape[1] - beside]
    d_x = empty((d_out_wide.shape[0], matrix.shape[1]), d_out_wide)
    if not p or not beside:
        return torch.mm(d_out_wide, matrix, out=d_x)
    # The dropped positions stand between A and x, so A cannot ride along.
    rows = matrix.shape[0] - beside
    torch.mm(d_out_wide[:, :rows], matrix[:rows], out=d_x)
    through_a = torch.mm(d_out_wide[:, rows:], matrix[rows:], out=empty(d_x.shape, d_x))
    dropout_add_(d_x, through_a, p, seed)
    return d_x


def gradient_of_input_beside(
    d_out: torch.Tensor, projection: Projection, laid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_x [T, H] but for what comes through the A's, d_xa [T, R]), from d_out [T, O] in one product.

    `add_adapters_` puts in the rest, by a pass over d_x: cheaper than `gradients_of_b_wide`'s pass over d_out where O
    is large. Not for dropout."""
    beside = extra(projection)
    product = wide(d_out.shape[0], laid.shape[1], d_out)
    torch.mm(d_out, laid[: d_out.shape[1]], out=product)
    features = laid.shape[1] - beside
    return product[:, :features], product[:, features:].mul_(_scale(projection))


def add_adapters_(d_x: torch.Tensor, d_xa: torch.Tensor, laid: torch.Tensor) -> torch.Tensor:
    """d_x [T, H] + d_xa A, in place."""
    return d_x.addmm_(d_xa, laid[laid.shape[0] - d_xa.shape[1] :, : d_x.shape[1]])


def fits_glu(gate_up: Projection, down: Projection) -> bool:
    """Whether there is an adapter beside an MLP's middle, and none too wide for `glu_backward_lora_`."""
    return 0 < max([*_ranks(gate_up), *_ranks(down)], default=0) <= MOST_RANK


def glu_backward_wide_(
    d_h: torch.Tensor,
    gate_up: torch.Tensor,
    activation: str,
    xs: torch.Tensor,
    gate_up_projection: Projection,
    d_ha: torch.Tensor,
    down: Projection,
    dots: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([d_b of gate's and up's adapters], [d_a of down's]), by `glu_backward_lora_` over gate_up [T, 2 I].

    dots: where it writes the sums for gate's and up's magnitudes to."""
    width, at = d_h.shape[1], 0
    halves: list[Pair | None] = [None, None]  # of gate and of up
    d_bs = []
    for adapter in gate_up_projection.adapters:
        rows, rank = adapter.rows, adapter.a.shape[0]
        d_b = empty((rows.stop - rows.start, rank), d_h)  # of one half, or of both where they are one linear
        for half in range(2):
            if rows.start <= half * width and (half + 1) * width <= rows.stop:
                halves[half] = xs[:, at : at + rank], d_b[half * width - rows.start :][:width]
        d_bs.append(d_b)
        at += rank
    d_as = [empty((rank, width), d_h) for rank in _ranks(down)]
    of_down = (d_ha[:, : len(d_as[0])], d_as[0]) if d_as else None
    glu_backward_lora_(
        d_h, gate_up[:, :width], gate_up[:, width:], activation, halves[0], halves[1], of_down,
        dots=dots, bias=gate_up_projection.bias,
    )  # fmt: skip
    return d_bs, d_as


def pays_beside(projection: Projection, out_features: int, in_features: int) -> bool:
    """Whether reading d_out once more [T, O] costs more than reading and writing d_x once more [T, H]."""
    return bool(projection.adapters) and out_features > 2 * in_features


def _ranks(projection: Projection) -> list[int]:
    return [adapter.a.shape[0] for adapter in projection.adapters]


def _scale(projection: Projection) -> float:
    (scale,) = {adapter.scale for adapter in projection.adapters}  # adapters of one input share it
    return scale


# ---- Triton: adapters into their places, up to three; a program writes rows of the B's or a piece of a row of the A's


@triton.jit
def _beside(
    laid_ptr, b0_ptr, b1_ptr, b2_ptr, stride, program, start0, end0, start1, end1, start2, end2,
    O: tl.constexpr, H: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    own = ((row >= start0) & (row < end0))[:, None] & (column < RANK)[None, :]
    value = tl.load(b0_ptr + (row - start0)[:, None] * RANK + column[None, :], mask=own, other=0.0)
    if COUNT > 1:
        column1 = column - RANK
        own = ((row >= start1) & (row < end1))[:, None] & ((column1 >= 0) & (column1 < RANK))[None, :]
        other = tl.load(b1_ptr + (row - start1)[:, None] * RANK + column1[None, :], mask=own, other=0.0)
        value = tl.where(own, other, value)
    if COUNT > 2:
        column2 = column - 2 * RANK
        own = ((row >= start2) & (row < end2))[:, None] & ((column2 >= 0) & (column2 < RANK))[None, :]
        other = tl.load(b2_ptr + (row - start2)[:, None] * RANK + column2[None, :], mask=own, other=0.0)
        value = tl.where(own, other, value)
    live = (row < O)[:, None] & (column < R)[None, :]
    tl.store(laid_ptr + row[:, None] * stride + H + column[None, :], value, mask=live)


@triton.jit
def _below(
    laid_ptr, a0_ptr, a1_ptr, a2_ptr, stride, program,
    O: tl.constexpr, H: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = (program // TILES).to(tl.int64)
    column = (program % TILES) * TILE + tl.arange(0, TILE)
    live = column < H
    value = tl.load(a0_ptr + row * H + column, mask=live & (row < RANK), other=0.0)
    if COUNT > 1:
        own = live & (row >= RANK) & (row < 2 * RANK)
        value = tl.where(own, tl.load(a1_ptr + (row - RANK) * H + column, mask=own, other=0.0), value)
    if COUNT > 2:
        own = live & (row >= 2 * RANK) & (row < 3 * RANK)
        value = tl.where(own, tl.load(a2_ptr + (row - 2 * RANK) * H + column, mask=own, other=0.0), value)
    tl.store(laid_ptr + (O + row) * stride + column, value, mask=live)


@triton.jit
def _lay_kernel(
    laid_ptr, a0_ptr, a1_ptr, a2_ptr, b0_ptr, b1_ptr, b2_ptr, stride, b_programs,
    start0, end0, start1, end1, start2, end2,  # rows of each adapter's outputs
    O: tl.constexpr, H: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < b_programs:
        _beside(
            laid_ptr, b0_ptr, b1_ptr, b2_ptr, stride, program, start0, end0, start1, end1, start2, end2,
            O, H, R, RANK, COUNT, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _below(laid_ptr, a0_ptr, a1_ptr, a2_ptr, stride, program - b_programs, O, H, RANK, COUNT, TILES, TILE)


@cost_of(_lay_kernel)
def _lay_cost(laid: torch.Tensor, *_: Any, O: int, H: int, R: int, **__: Any) -> Cost:
    return Cost(bytes=2 * (O + H) * R * laid.itemsize)


def _launch(projection: Projection, laid: torch.Tensor, out_features: int, in_features: int) -> None:
    adapters, beside = projection.adapters, laid.shape[0] - out_features
    rank, count = adapters[0].a.shape[0], len(adapters)
    assert count <= 3, f"{count} adapters of one input"
    assert {*_ranks(projection)} == {rank}, "adapters of one input have one rank"
    a, b = [ad.a.contiguous() for ad in adapters], [ad.b.contiguous() for ad in adapters]
    ends = [edge for ad in adapters for edge in (ad.start, ad.start + ad.b.shape[0])]
    columns, tile = next_power_of_2(beside), min(1024, next_power_of_2(in_features))
    rows = max(1, 4096 // columns)
    b_programs, tiles = cdiv(out_features, rows), cdiv(in_features, tile)
    spare = 3 - count  # arguments that are not read
    launch(
        _lay_kernel, (b_programs + beside * tiles,),
        laid, *a, *a[:1] * spare, *b, *b[:1] * spare, laid.stride(0), b_programs, *ends, *ends[:2] * spare,
        O=out_features, H=in_features, R=beside, RANK=rank, COUNT=count,
        ROWS=rows, COLUMNS=columns, TILES=tiles, TILE=tile, num_warps=4,
    )  # fmt: skip
