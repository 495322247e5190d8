"""Frozen linears with LoRA, all those of one input together: y = x W^T + b + scale * dropout(x) A^T B^T.

What costs time beside the base product is not arithmetic but passes over large tensors, so there are as few as can be:

- the A's of all projections of an input are stacked: one skinny product reads x once for q, k and v;
- each B is multiplied straight into the output (addmm), so no separate adapter output is written, scaled and added;
- backward mirrors it: d_x accumulates in place over all projections, and one stacked product gives every d_A.

The frozen weight is asked for when it is needed, as a function that returns it decoded (into scratch that the next call
may overwrite), and is never saved: in backward it is asked for again. Several linears of one input may be one
`Projection` whose weight is their rows one below the other, each adapter knowing at which output row it begins.

What is kept for backward beside x is x A^T, R numbers a token. Dropout is drawn once for an input, shared by its
projections, and again in backward from the same seed (`dropout.py`).

T tokens, H in features, O out features, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fsdp_qlora.kernels.device import empty, no_autocast
from fsdp_qlora.kernels.dora import scale_rows_
from fsdp_qlora.kernels.dropout import dropout, dropout_add_


class Adapter(NamedTuple):
    """a [R, H], b [O', R] of the compute dtype; scale; start: the output row of the projection where its O' begin."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    start: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.b.shape[0])


class Projection(NamedTuple):
    """weight() -> [O, H] of the compute dtype, good until the next weight() of any projection; bias [O] or None.

    weight(out) writes to out instead, whose rows may lie apart; only lora_wide.py asks for that. factor: of each output
    but for its bias, [O] as `dora.py` has it; weight() is times it already, the adapters' b are not.
    """

    weight: Callable[..., torch.Tensor]
    bias: torch.Tensor | None = None
    adapters: tuple[Adapter, ...] = ()
    factor: torch.Tensor | None = None


Gradients = list[tuple[torch.Tensor, ...]]  # of each adapter, in order: (d_a, d_b), and d_m where it has a magnitude


def lora_projections(
    x: torch.Tensor, projections: Sequence[Projection], *, p: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """The outputs [..., O] of several projections of one x [..., H]. Differentiable in x and every adapter's a and b.

    p, seed: dropout of the adapters' input, replayed in backward from the seed (an int of 63 bits). Everything of x's
    dtype, else ValueError. Weights and biases are frozen: a bias that requires a gradient is refused.
    """
    check(x, projections)
    bare, matrices = take_apart(projections)
    with no_autocast(x):
        outs: tuple[torch.Tensor, ...] = _Projections.apply(x, bare, p, seed, *matrices)
    return outs


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bare: list[Projection], p: float, seed: int, *matrices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        outs, xa = project(rows, put_together(bare, matrices), p=p, seed=seed)
        ctx.save_for_backward(x, xa, *matrices)
        ctx.bare, ctx.p, ctx.seed = bare, p, seed
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)

    @staticmethod
    def backward(ctx: Any, *d_outs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, xa, *matrices = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        d_rows = [d.reshape(-1, d.shape[-1]) for d in d_outs]
        projections = put_together(ctx.bare, matrices)
        with no_autocast(x):
            d_x, gradients = project_backward(
                d_rows, rows, xa, projections, p=ctx.p, seed=ctx.seed, want_x=ctx.needs_input_grad[0]
            )
        d_matrices = [d for pair in gradients for d in pair]
        return None if d_x is None else d_x.view(x.shape), None, None, None, *d_matrices


# ---- what an autograd function over projections needs: checks, and the matrices apart, where autograd sees them


def check(x: torch.Tensor, projections: Sequence[Projection], features: int | None = None) -> None:
    """Raises ValueError unless dtypes and shapes fit an input of x's dtype with `features` (default: x's) features."""
    features = x.shape[-1] if features is None else features
    for projection in projections:
        bias, adapters = projection.bias, projection.adapters
        if projection.factor is not None:
            raise ValueError("a projection's factor has no gradient here")
        for name, tensor in [("bias", bias), *(pair for ad in adapters for pair in (("a", ad.a), ("b", ad.b)))]:
            if tensor is not None and tensor.dtype != x.dtype:
                raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
        if bias is not None and bias.requires_grad:
            raise ValueError("a projection's bias is frozen here: it must not require a gradient")
        for a, b, _, _ in adapters:
            if a.shape[1:] != (features,) or b.shape[1:] != a.shape[:1]:
                raise ValueError(f"a must be [R, {features}] and b [O, R], got {tuple(a.shape)} and {tuple(b.shape)}")


def take_apart(projections: Sequence[Projection]) -> tuple[list[Projection], list[torch.Tensor]]:
    """(the projections with their adapters' matrices left out, the matrices)."""
    matrices = [m for projection in projections for adapter in projection.adapters for m in (adapter.a, adapter.b)]
    absent = torch.empty(0)
    bare = [
        projection._replace(adapters=tuple(adapter._replace(a=absent, b=absent) for adapter in projection.adapters))
        for projection in projections
    ]
    return bare, matrices


def put_together(bare: Sequence[Projection], matrices: Sequence[torch.Tensor]) -> list[Projection]:
    left = iter(matrices)
    return [
        projection._replace(adapters=tuple(ad._replace(a=next(left), b=next(left)) for ad in projection.adapters))
        for projection in bare
    ]


# ---- the passes themselves, for autograd functions that hold more than linears


def project(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    p: float = 0.0,
    seed: int = 0,
    outs: Sequence[torch.Tensor] | None = None,
    scale: float | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """([T, O] for each projection, x A^T [T, sum of R] or None without adapters), from x [T, H]. Outside autograd.

    outs: where the outputs go, stride 1 along O, else new tensors. scale: of all these adapters; x A^T is returned
    times it then, as `lora_wide.py` keeps it."""
    stacked, xa = _stacked_a(projections), None
    if stacked is not None:
        xa = empty((x.shape[0], stacked.shape[0]), x)
        x_dropped = dropout(x.contiguous(), p, seed) if p else x
        torch.addmm(xa, x_dropped, stacked.t(), beta=0, alpha=1.0 if scale is None else scale, out=xa)
        del x_dropped
    results, at = [], 0
    for i, (weight, bias, adapters, factor) in enumerate(projections):
        matrix = weight()
        out = empty((x.shape[0], matrix.shape[0]), x) if outs is None else outs[i]
        if bias is None:
            torch.mm(x, matrix.t(), out=out)
        else:
            torch.addmm(bias, x, matrix.t(), out=out)
        for adapter in adapters:
            assert xa is not None
            rank = adapter.a.shape[0]
            alpha = adapter.scale if scale is None else 1.0
            b = adapter.b
            if factor is not None:
                b = scale_rows_(empty(b.shape, b).copy_(b), factor[adapter.rows])
            out[:, adapter.rows].addmm_(xa[:, at : at + rank], b.t(), alpha=alpha)
            at += rank
        results.append(out)
    return results, xa


def project_backward(
    d_outs: Sequence[torch.Tensor],
    x: torch.Tensor,
    xa: torch.Tensor | None,
    projections: Sequence[Projection],
    *,
    p: float = 0.0,
    seed: int = 0,
    d_x: torch.Tensor | None = None,
    want_x: bool = True,
) -> tuple[torch.Tensor | None, Gradients]:
    """(d_x [T, H], the adapters' gradients) from what `project` was given and returned. Outside autograd.

    d_x: added to in place if given, else a new tensor; none with want_x False. The d_a's are rows of one tensor."""
    d_xa, d_bs = gradients_of_b(d_outs, xa, projections)
    d_as = gradients_of_a(d_xa, x, projections, p=p, seed=seed)
    if want_x:
        d_x = gradient_of_input(d_outs, d_xa, projections, p=p, seed=seed, d_x=d_x)
    return d_x, list(zip(d_as, d_bs, strict=True))


def gradients_of_b(
    d_outs: Sequence[torch.Tensor], xa: torch.Tensor | None, projections: Sequence[Projection]
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """(the gradient of xa [T, sum of R] or None, [d_b of each adapter]): neither x nor the weights are needed."""
    if xa is None:
        return None, []
    d_xa = torch.empty_like(xa)
    d_bs, at = [], 0
    for d_out, projection in zip(d_outs, projections, strict=True):
        for adapter in projection.adapters:
            part = slice(at, at + adapter.a.shape[0])
            d_rows = d_out[:, adapter.rows]
            torch.addmm(d_xa[:, part], d_rows, adapter.b, beta=0, alpha=adapter.scale, out=d_xa[:, part])
            d_b = torch.empty_like(adapter.b)
            torch.addmm(d_b, d_rows.t(), xa[:, part], beta=0, alpha=adapter.scale, out=d_b)
            d_bs.append(d_b)
            at = part.stop
    return d_xa, d_bs


def gradients_of_a(
    d_xa: torch.Tensor | None, x: torch.Tensor, projections: Sequence[Projection], *, p: float = 0.0, seed: int = 0
) -> list[torch.Tensor]:
    """[d_a of each adapter], in one product over the input x [T, H]."""
    if d_xa is None:
        return []
    stacked = d_xa.t() @ (dropout(x.contiguous(), p, seed) if p else x)
    return list(stacked.split([adapter.a.shape[0] for projection in projections for adapter in projection.adapters]))


def gradient_of_input(
    d_outs: Sequence[torch.Tensor],
    d_xa: torch.Tensor | None,
    projections: Sequence[Projection],
    *,
    p: float = 0.0,
    seed: int = 0,
    d_x: torch.Tensor | None = None,
) -> torch.Tensor:
    """d_x [T, H], through the frozen weights and the adapters; added to in place if given."""
    for d_out, projection in zip(d_outs, projections, strict=True):
        matrix = projection.weight()
        d_x = d_out @ matrix if d_x is None else d_x.addmm_(d_out, matrix)
    assert d_x is not None, "no projection"
    stacked = _stacked_a(projections)
    if d_xa is None or stacked is None:
        return d_x
    if p:
        dropout_add_(d_x, d_xa @ stacked, p, seed)
        return d_x
    return d_x.addmm_(d_xa, stacked)


def _stacked_a(projections: Sequence[Projection]) -> torch.Tensor | None:
    """[sum of R, H], or None."""
    every = [adapter.a for projection in projections for adapter in projection.adapters]
    if len(every) > 1:
        return torch.cat(every)
    return every[0] if every else None
