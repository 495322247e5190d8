"""What each attention backend allocates, as tensors on the meta device, and its FLOPs: so that a plan can run a block
there.

The operators' own meta forms, where they have one, leave out the workspace that a backend takes while it runs. Here it
is a tensor that lives as long as the call.

B batch, S sequence, N query heads, K key/value heads, D head dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fsdp_qlora.kernels.cost import Cost, count
from fsdp_qlora.kernels.device import cdiv
from fsdp_qlora.kernels.segments import padded_rows

FLOAT = 4  # bytes of float32
QUERIES = 512  # at a time in the math backend (`attention_math.PIECE`)
SCORES = 5  # score matrices of a piece alive at once in its backward: scores, p, d_p, d_scores, mask
BACKWARD = 2.5  # FLOPs of its backward per FLOP of its forward: five products for two
_multiprocessors = 0  # of the card that is counted for, where its backward is deterministic


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, workspace: int, saves_inputs: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor | tuple[torch.Tensor, ...], ...]]:
    """Return (out [B, S, N, D], stats) as `attention.attend` does. workspace: bytes."""
    count(Cost(attention=flops(q, window)))
    scratch = _scratch(q, workspace)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    del scratch
    return out, ((q, k, v), out, sums) if saves_inputs else (sums,)


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, workspace: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (d_q, d_k, d_v) as `attention.attend_backward` does. workspace: bytes."""
    count(Cost(attention_backward=BACKWARD * flops(q, window)))
    scratch = _scratch(q, workspace)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    del scratch
    return d_q, d_k, d_v


@contextmanager
def splitting_over(multiprocessors: int) -> Iterator[None]:
    """Count FlashAttention's backward as its deterministic form on a card with so many; 0: as it is by default.

    That form gives every multiprocessor something to do by splitting the keys where sequences and heads are fewer, and
    keeps a sum of d_q for each part."""
    global _multiprocessors
    before, _multiprocessors = _multiprocessors, multiprocessors
    try:
        yield
    finally:
        _multiprocessors = before


def math_workspace(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Return the bytes besides outputs, forward and backward, of score matrices and float32 copies."""
    batch, sequence, heads, _ = q.shape
    scores = batch * heads * min(QUERIES, sequence) * sequence * FLOAT
    wide = (q.numel() + 2 * k.numel()) * FLOAT
    return wide + 3 * scores + q.numel() * FLOAT, 2 * wide + SCORES * scores + q.numel() * FLOAT


def fused_workspace(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Return the bytes besides outputs, forward and backward: float32 sums of d_q, and keys' gradients for each query
    head."""
    return 0, _backward_workspace(q, k, q.numel())


def split_workspace(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Return the bytes of FlashAttention: as `fused_workspace`, or of its deterministic form (`splitting_over`)."""
    batch, sequence, heads, head_dim = q.shape
    parts = cdiv(_multiprocessors, batch * heads) if _multiprocessors else 1
    sums = parts * padded_rows(batch * sequence, batch) * heads * head_dim
    return 0, _backward_workspace(q, k, sums)


def _backward_workspace(q: torch.Tensor, k: torch.Tensor, sums: int) -> int:
    """Return the bytes of so many sums of d_q, of each row's own sum, and of gradients of keys and values that heads
    share."""
    tokens, heads = q.shape[0] * q.shape[1], q.shape[2]
    shared = 2 * q.numel() * q.element_size() if k.shape[2] < heads else 0
    return sums * FLOAT + tokens * heads * FLOAT + shared


def flops(q: torch.Tensor, window: int | None) -> float:
    """Return the FLOPs of a forward: two products of queries with the keys each one sees (FlashAttention, arXiv
    2205.14135)."""
    return 4 * keys_seen(q.shape[1], window) * q.numel()


def keys_seen(context: int, window: int | None) -> float:
    """Return the mean number of keys that a causal query sees: (S + 1) / 2, fewer through a window."""
    w = context if window is None else min(window, context)
    return (w * (w + 1) / 2 + (context - w) * w) / context


def _scratch(q: torch.Tensor, nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=q.device)
