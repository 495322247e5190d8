"""Bytes of Hugging Face's own layers and head, where blocks are not fused: counted by formula, not placed."""

from fsdp_qlora.kernels.cross_entropy import chunk_tokens
from fsdp_qlora.plan.costs import BlockBytes
from fsdp_qlora.plan.inputs import FLOAT, Facts


def layer_bytes(facts: Facts) -> BlockBytes:
    """A Hugging Face layer whose linears are replaced: what autograd keeps of it, all at once where it recomputes.

    Kept numbers a token: two norms' input in float32 and output, q, k, v and their rotated copies, attention's output,
    the residual sums, gate, up, act(gate), their product, each adapter's middle."""
    f, c = facts, facts.compute_bytes
    norms = 2 * f.hidden * (FLOAT + c)
    attention = (2 * f.qkv + f.queries + 2 * f.hidden) * c + f.heads * FLOAT
    inner = 4 * f.inner * c
    ranks = (f.rank_qkv + f.rank_o + f.rank_gate_up + f.rank_down) * c
    inside = f.tokens * (norms + attention + inner + ranks)
    passing = f.tokens * (2 * f.inner + 2 * f.hidden) * c  # gradients on their way through the MLP
    h = f.tokens * f.hidden * f.stream_bytes
    if f.remat:
        return BlockBytes(h, 0, h + inside, inside + passing + f.largest_adapters * c, 0)
    return BlockBytes(h + inside, 0, h + inside, passing + f.largest_adapters * c, 0)


def head_bytes(facts: Facts) -> int:
    """Return the bytes of Hugging Face's final norm, the head and the loss at their worst moment, beside what the
    blocks keep: the norm keeps the last block's output in float32, of which its backward makes four more."""
    f, c = facts, facts.compute_bytes
    numbers = f.tokens * f.hidden
    logits = min(chunk_tokens(f.vocabulary), f.tokens) * (-(-f.vocabulary // 16) * 16) * c
    labelled, kept = 2 * numbers * c, numbers * FLOAT  # the labelled rows and their gradient
    return max(kept + numbers * f.stream_bytes + labelled + logits, kept + 4 * FLOAT * numbers + labelled)
