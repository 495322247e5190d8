"""LoRA inside the base product: the adapter rides along as a few more columns of matrices that are multiplied anyway.

    y   = x W^T + s x A^T B^T       = [x | s x A^T] [W | B]^T
    d_x = d_y W + d_xa A            = [d_y | d_xa] [W ; A],        d_xa = s d_y B

A frozen weight is decoded into scratch before each use, so B (or A) can be laid beside it for free, and x is written
into a buffer with room for R more columns by whoever computes it. Then the adapter costs R/H more arithmetic (0.4 % at
rank 16) instead of another pass over the output: at 8B shape and 8,192 tokens that pass reads and writes 0.5 GB for
gate alone. The sum is also rounded once, where separate products round twice.

What is kept of the adapter's middle, `xs`, is s x A^T: its gradient formulas then need no further scaling.
Everything here is outside autograd, for functions that hold more than linears. Adapters of one input share a scale.

T tokens, H in features, O out features, R the sum of the ranks of an input's adapters, rounded up to 8 for alignment.
"""

from collections.abc import Callable, Sequence

import torch

from fsdp_qlora.kernels.dropout import dropout, dropout_add_
from fsdp_qlora.kernels.lora import Projection

ALIGN = 8  # numbers: 16 bytes in 16-bit dtypes, which fast matrix products ask of a row's start
PITCH = 64  # numbers from row to row: a multiple of this, 128 bytes, for whole cache lines
# (rows, columns, place) -> scratch as of `wide`, good until that place is asked for again.
Room = Callable[[int, int, int], torch.Tensor]


def wide(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised [rows, columns] with rows that begin on whole cache lines."""
    return like.new_empty(rows, -(-columns // PITCH) * PITCH)[:, :columns]


def extra(projections: Sequence[Projection]) -> int:
    """R, the columns that the adapters of one input need beside it."""
    ranks = sum(adapter.a.shape[0] for projection in projections for adapter in projection.adapters)
    return -(-ranks // ALIGN) * ALIGN


def adapt_(
    x_wide: torch.Tensor, features: int, projections: Sequence[Projection], *, p: float, seed: int
) -> torch.Tensor:
    """Fill x_wide [T, H + R] beside x, its first H columns, with xs; returns that view [T, R]."""
    xs = x_wide[:, features:]
    a_RH, scale = _stacked(projections)
    if a_RH is None:
        return xs
    x = x_wide[:, :features]
    if p:
        x = dropout(x.contiguous(), p, seed)
    used = xs[:, : a_RH.shape[0]]
    torch.addmm(used, x, a_RH.t(), beta=0, alpha=scale, out=used)
    xs[:, a_RH.shape[0] :].zero_()
    return xs


def project_wide(
    x_wide: torch.Tensor,
    features: int,
    projections: Sequence[Projection],
    outs: Sequence[torch.Tensor],
    room: Room,
    *,
    plus: torch.Tensor | None = None,
    first: int | None = None,
) -> list[torch.Tensor]:
    """Write each projection of x_wide [T, H + R], adapted already, to outs[i] [T, O], stride 1 along O.

    plus: [T, O] added to the one output of a projection without a bias (a residual).
    first: the place of the first weight, the next ones following, with room below each for its input's adapters: then
    what is returned, the weights [O + R, H + R], serves `gradient_of_input_wide` too. By default all use place 0."""
    at, weights = 0, []
    below = 0 if first is None else x_wide.shape[1] - features
    for i, (projection, out) in enumerate(zip(projections, outs, strict=True)):
        rows = out.shape[1]
        whole = room(rows + below, x_wide.shape[1], 0 if first is None else first + i)
        weight = whole[:rows]
        projection.weight(weight[:, :features])
        beside = weight[:, features:]
        if beside.numel() and (len(projection.adapters) != 1 or projection.adapters[0].b.shape != beside.shape):
            beside.zero_()
        for adapter in projection.adapters:
            rank = adapter.a.shape[0]
            beside[adapter.rows, at : at + rank].copy_(adapter.b)
            at += rank
        summand = projection.bias if plus is None else plus
        assert plus is None or projection.bias is None, "an output takes a bias or a residual"
        if summand is None:
            torch.mm(x_wide, weight.t(), out=out)
        else:
            torch.addmm(summand, x_wide, weight.t(), out=out)
        weights.append(whole)
    return weights


def gradients_of_b_wide(
    d_outs: Sequence[torch.Tensor], xs: torch.Tensor, d_xa: torch.Tensor, projections: Sequence[Projection]
) -> list[torch.Tensor]:
    """[d_b of each adapter]; fills d_xa [T, R], the gradient of x A^T, on the way."""
    d_bs, at = [], 0
    for d_out, projection in zip(d_outs, projections, strict=True):
        for adapter in projection.adapters:
            part = slice(at, at + adapter.a.shape[0])
            d_rows, d_part = d_out[:, adapter.rows], d_xa[:, part]
            torch.addmm(d_part, d_rows, adapter.b, beta=0, alpha=adapter.scale, out=d_part)
            d_bs.append(d_rows.t() @ xs[:, part])
            at = part.stop
    d_xa[:, at:].zero_()
    return d_bs


def gradients_of_a_wide(
    d_xa: torch.Tensor, x: torch.Tensor, projections: Sequence[Projection], *, p: float, seed: int
) -> list[torch.Tensor]:
    """[d_a of each adapter] in one product over the input x [T, H]."""
    ranks = [adapter.a.shape[0] for projection in projections for adapter in projection.adapters]
    if not ranks:
        return []
    if p:
        x = dropout(x.contiguous(), p, seed)
    return list((d_xa[:, : sum(ranks)].t() @ x).split(ranks))


def gradient_of_input_wide(
    d_outs: Sequence[torch.Tensor],
    d_last_wide: torch.Tensor,
    projections: Sequence[Projection],
    features: int,
    room: Room,
    *,
    p: float,
    seed: int,
    decoded: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """d_x [T, H], new. d_last_wide: [T, O + R], the last of d_outs with d_xa beside it.

    decoded: the weights as `project_wide` has just left them, each in a place of its own; else they are decoded."""
    a_RH, _ = _stacked(projections)
    beside = extra(projections)
    d_x: torch.Tensor | None = None
    for i, (d_out, projection) in enumerate(zip(d_outs, projections, strict=True)):
        rows = d_out.shape[1]
        along = a_RH is not None and not p and i == len(d_outs) - 1
        used = d_last_wide.shape[1] if along else rows
        if decoded:
            weight = decoded[i][:used, :features]
        else:  # rows as far apart as those of `decoded`: the same product whatever was computed before it
            weight = room(used, features + beside, 0)[:, :features]
            projection.weight(weight[:rows])
        if along:
            assert a_RH is not None
            weight[rows : rows + a_RH.shape[0]].copy_(a_RH)
            weight[rows + a_RH.shape[0] :].zero_()
            d_out = d_last_wide
        d_x = d_out @ weight if d_x is None else d_x.addmm_(d_out, weight)
    assert d_x is not None
    if a_RH is not None and p:  # the dropped positions stand between A and x, so A cannot ride along
        d_xa = d_last_wide[:, d_outs[-1].shape[1] :][:, : a_RH.shape[0]]
        dropout_add_(d_x, d_xa @ a_RH, p, seed)
    return d_x


def _stacked(projections: Sequence[Projection]) -> tuple[torch.Tensor | None, float]:
    """(all A's one below the other [sum of ranks, H] or None, their scale)."""
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    if not adapters:
        return None, 0.0
    assert len({adapter.scale for adapter in adapters}) == 1, "adapters of one input share a scale"
    every = [adapter.a for adapter in adapters]
    return every[0] if len(every) == 1 else torch.cat(every), adapters[0].scale
