"""Attention over documents that lie one after the other, in parts: what a backend computes of one part, put together.

A part is a document, or a group of them where a backend takes several. The row sums of all parts are one tensor, each
part's numbers in one piece, so that what a block saves does not depend on how many parts there are.

T tokens of all parts, N query heads, K key/value heads, D head dim.
"""

from collections.abc import Callable, Sequence

import torch

from fsdp_qlora.kernels.attention_math import Gradients, Masking, Stats
from fsdp_qlora.kernels.segments import Segments

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Masking], tuple[torch.Tensor, torch.Tensor]]


def forward_by_parts(
    parts: Sequence[slice],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [1, T, N, D], float32 row sums [N * T]) of what `call` (number of the part, its q, k, v) returns."""
    found = [call(i, q[:, part], k[:, part], v[:, part]) for i, part in enumerate(parts)]
    if len(found) == 1:
        return found[0][0], found[0][1].reshape(-1)
    return torch.cat([out for out, _ in found], 1), torch.cat([sums.reshape(-1) for _, sums in found])


def backward_by_parts(
    parts: Sequence[slice],
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    call: Callable[..., Gradients],
) -> Gradients:
    """Return the gradients of what `call` (number of the part, its d_out, q, k, v, out, sums) returns."""
    heads = q.shape[2]
    found = []
    for i, part in enumerate(parts):
        here = [x[:, part] for x in (d_out, q, k, v, out)]
        found.append(call(i, *here, sums[heads * part.start : heads * part.stop]))
    if len(found) == 1:
        return found[0]
    d_q, d_k, d_v = (torch.cat(gradients, 1) for gradients in zip(*found, strict=True))
    return d_q, d_k, d_v


def one_by_one(
    forward: Forward,
    backward: Callable[..., Gradients],
    sums_shape: Callable[[torch.Tensor, torch.Tensor], tuple[int, ...]],
) -> tuple[Callable[..., tuple[torch.Tensor, Stats]], Callable[..., Gradients]]:
    """Return the passes of a backend that takes rows of one length: it is called for each document.

    sums_shape: of its row sums, from q and k."""

    def forward_of_all(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking, segments: Segments | None
    ) -> tuple[torch.Tensor, Stats]:
        if segments is None:
            return forward(q, k, v, masking)
        return forward_by_parts(segments.documents, q, k, v, lambda _, q, k, v: forward(q, k, v, masking))

    def backward_of_all(
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        sums: torch.Tensor,
        masking: Masking,
        segments: Segments | None,
    ) -> Gradients:
        if segments is None:
            return backward(d_out, q, k, v, out, sums, masking)

        def call(_: int, d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: torch.Tensor) -> Gradients:
            v, out, sums = rest
            return backward(d_out, q, k, v, out, sums.view(sums_shape(q, k)), masking)

        return backward_by_parts(segments.documents, d_out, q, k, v, out, sums, call)

    return forward_of_all, backward_of_all
