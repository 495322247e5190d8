"""Shapes that the plan's arithmetic is held against, as the numbers that `facts_of` reads off a model."""

from dataclasses import replace
from typing import Any

from fsdp_qlora.plan_facts import Facts, keys_seen
from fsdp_qlora.units import GIB

BF16, FLOAT = 2, 4  # bytes
# hidden, inner, layers, heads, key/value heads, head dim, vocabulary
SHAPES = {
    "llama3_8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "llama2_13b": (5120, 13824, 40, 40, 40, 128, 32000),
    "llama2_70b": (8192, 28672, 80, 64, 8, 128, 32000),
    "llama3_70b": (8192, 28672, 80, 64, 8, 128, 128256),
}


def nf4_bytes(numbers: int) -> int:
    """Double-quantized, each part rounded up to 256 bytes (`frozen.ALIGN`)."""
    blocks = -(-numbers // 64)
    return sum(-(-n // 256) * 256 for n in (numbers // 2, blocks, 4 * -(-blocks // 256), 4))


def facts(shape: str, batch: int, context: int, rank: int, ranks: int = 1, **changes: Any) -> Facts:
    """As `train.py` has them for a Llama of that shape, double-quantized NF4, bf16, AdamW, adapters on all linears."""
    hidden, inner, layers, heads, kv, dim, vocabulary = SHAPES[shape]
    queries, pairs = heads * dim, kv * dim
    linears = [(queries, hidden), (pairs, hidden), (pairs, hidden), (hidden, queries)]
    linears += [(inner, hidden), (inner, hidden), (hidden, inner)]
    block = sum(nf4_bytes(o * i) for o, i in linears) + 2 * hidden * BF16
    known = Facts(
        layers=layers,
        block_bytes=-(-block // (256 * ranks)) * 256 * ranks,
        embedding_bytes=vocabulary * hidden * BF16,
        embedding_on_host=True,
        head_bytes=vocabulary * hidden * BF16,
        rest_bytes=hidden * BF16,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        vocabulary=vocabulary,
        linear_numbers=sum(o * i for o, i in linears),
        qkv_linears=3,
        gate_up_linears=2,
        rank_qkv=3 * rank,
        rank_o=rank,
        rank_gate_up=2 * rank,
        rank_down=rank,
        adapter_parameters=sum(rank * (o + i) for o, i in linears),
        norms_after=False,
        head_norms=False,
        codec="nf4-double-quantized",
        stream_bytes=BF16,
        compute_bytes=BF16,
        reduce_bytes=FLOAT,
        state_bytes=8,
        batch=batch,
        context=context,
        accumulation=1,
        no_sync=False,
        dropout=0.0,
        ranks=ranks,
        local_ranks=ranks,
        fused=True,
        remat=True,
        attention="cudnn",
        keys=keys_seen(context, None),
        workspace_bytes=32 << 20,
        dummy=True,
    )
    return replace(known, **changes)


def gib(nbytes: float) -> float:
    return nbytes / GIB
