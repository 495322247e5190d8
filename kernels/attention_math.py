"""Attention in plain PyTorch, in float32 and in pieces of queries: the meaning that other backends are tested against.

    scores = softcap(scale * q k^T),  softcap(s) = c * tanh(s / c)       key j is seen by query i if i - window < j <= i
    out = softmax(scores) v                                               stats: log-sum-exp of each row of scores

B batch, S sequence, N query heads, K key/value heads, G = N / K, D head dim.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

PIECE = 512  # queries at a time

# What a backend's backward needs beside q, k, v and out: a tensor, or tensors and integers as its library groups them.
Stats: TypeAlias = torch.Tensor | int | Sequence["Stats"] | None
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # d_q, d_k, d_v


class Masking(NamedTuple):
    """What shapes the scores. scale: of q k^T. window: how many keys a query sees, itself included; None for all."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def _scores(q: torch.Tensor, k: torch.Tensor, masking: Masking, first: int) -> torch.Tensor:
    """Softcapped and masked scores of queries q [B, K, G, s, D], the first at position `first`, and k [B, K, S, D]."""
    scores = torch.einsum("bkgsd,bktd->bkgst", q, k) * masking.scale
    if masking.softcap is not None:
        scores = torch.tanh(scores / masking.softcap) * masking.softcap
    rows = torch.arange(first, first + q.shape[3], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)[None, :]
    hidden = columns > rows
    if masking.window is not None:
        hidden = hidden | (columns <= rows - masking.window)
    return scores.masked_fill(hidden, -math.inf)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, S, N, D] -> [B, K, G, S, D] in at least float32."""
    b, s, n, d = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.view(b, s, kv_heads, n // kv_heads, d).permute(0, 2, 3, 1, 4)


def _ungrouped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    b, k, g, s, d = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(b, s, k * g, d).to(like.dtype)


def math_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys, values = _grouped(q, k.shape[2]), _grouped(k, k.shape[2])[:, :, 0], _grouped(v, v.shape[2])[:, :, 0]
    outs, sums = [], []
    for first in range(0, q.shape[1], PIECE):
        scores = _scores(queries[:, :, :, first : first + PIECE], keys, masking, first)
        outs.append(torch.einsum("bkgst,bktd->bkgsd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return _ungrouped(torch.cat(outs, 3), q), torch.cat(sums, 3)


def math_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    masking: Masking,
) -> Gradients:
    kv_heads = k.shape[2]
    queries, keys, values = _grouped(q, kv_heads), _grouped(k, kv_heads)[:, :, 0], _grouped(v, kv_heads)[:, :, 0]
    d_outs = _grouped(d_out, kv_heads)
    d_keys, d_values, d_queries = torch.zeros_like(keys), torch.zeros_like(values), []
    for first in range(0, q.shape[1], PIECE):
        piece = slice(first, first + PIECE)
        scores = _scores(queries[:, :, :, piece], keys, masking, first)
        p = torch.exp(scores - lse[:, :, :, piece, None])
        d_o = d_outs[:, :, :, piece]
        d_values += torch.einsum("bkgst,bkgsd->bktd", p, d_o)
        d_p = torch.einsum("bkgsd,bktd->bkgst", d_o, values)
        d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True))  # exactly 0 where a query sees one key
        if masking.softcap is not None:
            d_scores *= 1 - (scores.masked_fill(p == 0, 0.0) / masking.softcap).square()
        d_scores *= masking.scale
        d_queries.append(torch.einsum("bkgst,bktd->bkgsd", d_scores, keys))
        d_keys += torch.einsum("bkgst,bkgsd->bktd", d_scores, queries[:, :, :, piece])
    return (
        _ungrouped(torch.cat(d_queries, 3), q),
        _ungrouped(d_keys[:, :, None], k),
        _ungrouped(d_values[:, :, None], v),
    )
