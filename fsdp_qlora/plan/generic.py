"""Bytes and work of Hugging Face's own layers and head, where blocks are not fused: bytes by formula, for nothing is
placed; work as that of a fused block of these sizes that keeps everything."""

from dataclasses import replace

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.kernels.cost import Cost
from fsdp_qlora.kernels.cross_entropy import chunk_tokens
from fsdp_qlora.plan.costs import BlockCost, HeadCost, Kind, block_costs
from fsdp_qlora.plan.costs import head_cost as traced_head
from fsdp_qlora.plan.inputs import FLOAT, KEEP, Facts

NORM_PASSES = 8 + 15  # over numbers in float32, of Hugging Face's final norm forward and backward
NORM_LAUNCHES = 45


def layer_costs(facts: Facts) -> dict[Kind, BlockCost]:
    """Return what a layer takes and costs: alike for all kinds of block, of which there is one."""
    like = block_costs(replace(facts, adapted=""))["all", False]
    multiplied = facts.hidden * (facts.qkv + facts.queries + 3 * facts.intermediate)
    scale = facts.linear_numbers / multiplied  # a family's layer may have other linears
    reads_norms = ADAPTERS[facts.adapter].reads_norms
    products = 2 if reads_norms and facts.dropout else 1  # with each weight, of the dropped input and of the other
    kept, forward_bytes, backward_bytes = _layer_bytes(facts)
    forward, backward = (_scaled(cost, scale * products) for cost in (like.forward, like.backward))
    once = _scaled(like.once, scale)
    cost = BlockCost(kept, 0, forward_bytes, backward_bytes, 0, forward, backward, once)
    return {(keep, offloaded): cost for keep in KEEP for offloaded in (False, True)}


def head_cost(facts: Facts) -> HeadCost:
    """Return what Hugging Face's final norm, the head and the loss take and cost, beside what the blocks keep."""
    numbers = facts.tokens * facts.hidden
    norm = Cost(bytes=numbers * NORM_PASSES * FLOAT, launches=NORM_LAUNCHES)
    return HeadCost(_head_bytes(facts), 0, traced_head(facts, normed=False).cost + norm)


def _scaled(cost: Cost, scale: float) -> Cost:
    """With matmuls and weights of so many times the size."""
    return replace(
        cost, forward=cost.forward * scale, backward=cost.backward * scale, dequantized=cost.dequantized * scale
    )


def _layer_bytes(facts: Facts) -> tuple[int, int, int]:
    """Return the bytes that a Hugging Face layer whose linears are replaced keeps, and of working tensors forward and
    backward: what autograd keeps of it, all at once where it recomputes.

    Kept numbers a token: two norms' input in float32 and output, q, k, v and their rotated copies, attention's output,
    the residual sums, gate, up, act(gate), their product, each adapter's middle."""
    f, c = facts, facts.compute_bytes
    norms = 2 * f.hidden * (FLOAT + c)
    attention = (2 * f.qkv + f.queries + 2 * f.hidden) * c + f.heads * FLOAT
    inner = 4 * f.intermediate * c
    ranks = (f.lora_rank_qkv + f.lora_rank_o + f.lora_rank_gate_up + f.lora_rank_down) * c
    if ADAPTERS[f.adapter].reads_norms:  # each output before its magnitude; with dropout of two products
        ranks += (f.qkv + 2 * f.hidden + 2 * f.intermediate) * (FLOAT + c) * (2 if f.dropout else 1)
    inside = f.tokens * (norms + attention + inner + ranks)
    passing = f.tokens * (2 * f.intermediate + 2 * f.hidden) * c  # gradients on their way through the MLP
    h = f.tokens * f.hidden * f.stream_bytes
    if f.remat:
        return h, h + inside, inside + passing + f.largest_adapters * c
    return h + inside, h + inside, passing + f.largest_adapters * c


def _head_bytes(facts: Facts) -> int:
    """Return the bytes at the worst moment: the norm keeps the last block's output in float32, of which its backward
    makes four more."""
    f, c = facts, facts.compute_bytes
    numbers = f.tokens * f.hidden
    logits = min(chunk_tokens(f.vocabulary), f.tokens) * (-(-f.vocabulary // 16) * 16) * c
    labelled, kept = 2 * numbers * c, numbers * FLOAT  # the labelled rows and their gradient
    return max(kept + numbers * f.stream_bytes + labelled + logits, kept + 4 * FLOAT * numbers + labelled)
