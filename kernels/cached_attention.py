"""Attention of one new token of each row over the keys and values that are kept of the tokens before it.

    scores = softcap(scale * q k^T)      key j of n is seen if n - window <= j < n; the token's own key is the last of n
    out = softmax(scores) v

There is one query and a long list of keys, so the time is that of reading keys and values once. Few rows have few
heads, less than a GPU has multiprocessors: the keys of a head are split among several programs, each of which leaves
its weighted sum with the largest score and the sum of weights, and a second kernel joins them. How many keys a row has
is read from memory, so that a captured graph serves every step; programs whose keys are not there yet end at once.

B rows, C tokens that a row has place for, N query heads, K key/value heads, G = N / K, D head dim, P parts.
"""

import math
from typing import Any

import torch

from fsdp_qlora.kernels.attention_math import Masking
from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import INTERPRETER, cdiv, launch, next_power_of_2, on_triton, tl, triton
from fsdp_qlora.kernels.tanh import tanh

TILE_BYTES = 32 << 10  # of keys that a program looks at together, and of values: most cards hold both in shared memory
FLOAT_TILE_BYTES = 16 << 10  # in float32, for cards before Ampere: twice as much takes 72 of their 64 KiB
JOINED = 16 << 10  # sums that a program joins at a time: of 512 parts of 256 at once it would have a thousand a thread
PROGRAMS = 512  # that are wanted, about two to four a multiprocessor


def attend_cached(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, masking: Masking
) -> torch.Tensor:
    """Return out [B, N, D] of q's dtype, contiguous. Outside autograd.

    q: [B, N, D], any strides with the last one 1. keys, values: [B, C, K, D], contiguous, of q's dtype, finite also
    where there is none yet. seen: int64 [B], contiguous: keys of each row with the new token's own, at least 1.
    Raises ValueError where these do not fit."""
    rows, heads, size = q.shape
    if keys.shape != values.shape or keys.shape[0] != rows or keys.shape[3] != size or heads % keys.shape[2]:
        raise ValueError(f"keys and values must be [{rows}, C, K, {size}], K dividing {heads}, got {tuple(keys.shape)}")
    if seen.shape != (rows,) or keys.dtype != q.dtype or values.dtype != q.dtype:
        raise ValueError(f"seen must be [{rows}] and keys {q.dtype}, got {tuple(seen.shape)} and {keys.dtype}")
    if q.stride(2) != 1 or not all(x.is_contiguous() for x in (keys, values, seen)):
        raise ValueError("q must have stride 1 along D; keys, values and seen must be contiguous")
    return _launch(q, keys, values, seen, masking) if on_triton(q) else _plain(q, keys, values, seen, masking)


def _plain(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, masking: Masking
) -> torch.Tensor:
    most = int(seen.max())
    kv_heads, wide = keys.shape[2], torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).view(q.shape[0], kv_heads, -1, q.shape[2])
    scores = torch.einsum("bkgd,btkd->bkgt", queries, keys[:, :most].to(wide)) * masking.scale
    if masking.softcap is not None:
        scores = torch.tanh(scores / masking.softcap) * masking.softcap
    places = torch.arange(most, device=q.device)
    hidden = places >= seen[:, None]
    if masking.window is not None:
        hidden = hidden | (places < seen[:, None] - masking.window)
    weights = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
    return torch.einsum("bkgt,btkd->bkgd", weights, values[:, :most].to(wide)).reshape(q.shape).to(q.dtype)


# ---- Triton


@triton.jit
def _part_kernel(
    q_ptr, k_ptr, v_ptr, seen_ptr, sums_ptr, tops_ptr, totals_ptr, scale, softcap, q_row, q_head,
    C: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, G_TILE: tl.constexpr, D_TILE: tl.constexpr,
    FLOAT: tl.constexpr,
):  # fmt: skip
    """Part of the keys of a row's key head, for all query heads that share it. WINDOW 0: none. FLOAT: products of
    float32 numbers."""
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = pair // K, pair % K
    seen = tl.load(seen_ptr + row).to(tl.int32)
    lowest = seen * 0
    if WINDOW > 0:
        lowest = seen - WINDOW
    heads, d, places = tl.arange(0, G_TILE), tl.arange(0, D_TILE), tl.arange(0, TILE)
    is_head, is_d = heads < G, d < D
    q_at = q_ptr + row.to(tl.int64) * q_row + (head * G + heads)[:, None] * q_head + d[None, :]
    q = tl.load(q_at, mask=is_head[:, None] & is_d[None, :], other=0.0)
    if FLOAT:
        q = q.to(tl.float32)
    top = tl.full([G_TILE], -float("inf"), tl.float32)
    total = tl.zeros([G_TILE], tl.float32)
    summed = tl.zeros([G_TILE, D_TILE], tl.float32)
    base = row.to(tl.int64) * C * K * D + head * D
    for tile in range(TILES):
        start = (part * TILES + tile) * TILE
        if (start < seen) & (start + TILE > lowest):
            at = start + places
            live = (at < seen) & (at >= lowest)
            inside = base + at.to(tl.int64)[:, None] * (K * D) + d[None, :]  # 131,072 keys of 16,384 are 2^31
            mask = live[:, None] & is_d[None, :]
            k = tl.load(k_ptr + inside, mask=mask, other=0.0)
            v = tl.load(v_ptr + inside, mask=mask, other=0.0)
            if FLOAT:
                k, v = k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP:
                scores = tanh(scores / softcap) * softcap
            scores = tl.where(live[None, :], scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp(top - higher)
            weights = tl.exp(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
    place = (pair * PARTS + part) * G + heads
    tl.store(tops_ptr + place, top, mask=is_head)
    tl.store(totals_ptr + place, total, mask=is_head)
    tl.store(sums_ptr + place[:, None] * D + d[None, :], summed, mask=is_head[:, None] & is_d[None, :])


@triton.jit
def _join_kernel(
    sums_ptr, tops_ptr, totals_ptr, out_ptr,
    G: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, P_TILE: tl.constexpr, D_TILE: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """One query head: its parts into one, TOGETHER of them at a time."""
    program = tl.program_id(0)
    pair, head = program // G, program % G
    parts, d = tl.arange(0, P_TILE), tl.arange(0, D_TILE)
    is_part = parts < PARTS
    place = (pair * PARTS + parts) * G + head
    top = tl.load(tops_ptr + place, mask=is_part, other=-float("inf"))
    highest = tl.max(top, 0)
    total = tl.sum(tl.exp(top - highest) * tl.load(totals_ptr + place, mask=is_part, other=0.0), 0)
    summed = tl.zeros([D_TILE], tl.float32)
    for first in range(0, PARTS, TOGETHER):
        some = first + tl.arange(0, TOGETHER)
        is_some = some < PARTS
        at = (pair * PARTS + some) * G + head
        factor = tl.exp(tl.load(tops_ptr + at, mask=is_some, other=-float("inf")) - highest)
        mask = is_some[:, None] & (d < D)[None, :]
        sums = tl.load(sums_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        summed += tl.sum(sums * factor[:, None], 0)
    tl.store(out_ptr + program * D + d, (summed / total).to(out_ptr.dtype.element_ty), mask=d < D)


@cost_of(_part_kernel, _join_kernel)
def _cost(*args: Any, **_: Any) -> Cost:
    return Cost(bytes=sum(x.nbytes for x in args if isinstance(x, torch.Tensor)))


def _launch(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, masking: Masking
) -> torch.Tensor:
    rows, heads, size = q.shape
    places, kv_heads = keys.shape[1], keys.shape[2]
    d_tile = max(16, next_power_of_2(size))
    tile_bytes = FLOAT_TILE_BYTES if q.dtype == torch.float32 else TILE_BYTES
    tile = max(16, min(64, tile_bytes // (d_tile * keys.element_size())))
    group, tiles = heads // kv_heads, cdiv(places, tile)
    parts = max(1, min(tiles, PROGRAMS // (rows * kv_heads)))
    tiles = cdiv(tiles, parts)
    sums = torch.empty((rows * kv_heads * parts * group, size), dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty(sums.shape[0], dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty((rows, heads, size), dtype=q.dtype, device=q.device)
    launch(
        _part_kernel, (rows * kv_heads, parts),
        q, keys, values, seen, sums, tops, totals, masking.scale, masking.softcap or 1.0, q.stride(0), q.stride(1),
        C=places, K=kv_heads, G=group, D=size, WINDOW=masking.window or 0, SOFTCAP=masking.softcap is not None,
        PARTS=parts, TILES=tiles, TILE=tile, G_TILE=max(16, next_power_of_2(group)), D_TILE=d_tile,
        FLOAT=q.dtype == torch.float32 or INTERPRETER,
    )  # fmt: skip
    launch(
        _join_kernel, (rows * heads,), sums, tops, totals, out,
        G=group, D=size, PARTS=parts, P_TILE=next_power_of_2(parts), D_TILE=d_tile,
        TOGETHER=min(next_power_of_2(parts), max(1, JOINED // d_tile)),
    )  # fmt: skip
    return out
