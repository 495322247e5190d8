"""Shapes that the plan's arithmetic is held against, as the numbers that `facts_of` reads off a model."""

from dataclasses import dataclass, replace
from typing import Any

from fsdp_qlora.kernels.attention_on_meta import keys_seen
from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Placed
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.units import GIB

BF16, FLOAT = 2, 4  # bytes
# Of a block in both passes at level `input`: when these runs were measured, and now.
LAUNCHES_THEN, LAUNCHES_NOW = 125, 68
# hidden, intermediate, layers, heads, key/value heads, head dim, vocabulary
SHAPES = {
    "llama3_8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "llama2_13b": (5120, 13824, 40, 40, 40, 128, 32000),
    "llama2_70b": (8192, 28672, 80, 64, 8, 128, 32000),
    "llama3_70b": (8192, 28672, 80, 64, 8, 128, 128256),
}


def nf4_bytes(numbers: int) -> int:
    """Double-quantized, each part rounded up to 256 bytes (`weights.layout.ALIGN`)."""
    blocks = -(-numbers // 64)
    return sum(-(-n // 256) * 256 for n in (numbers // 2, blocks, 4 * -(-blocks // 256), 4))


def facts(shape: str, batch: int, context: int, rank: int, ranks: int = 1, **changes: Any) -> Facts:
    """As `train.py` has them for a Llama of that shape, double-quantized NF4, bf16, AdamW, adapters on all linears."""
    hidden, intermediate, layers, heads, kv, dim, vocabulary = SHAPES[shape]
    queries, pairs = heads * dim, kv * dim
    linears = [(queries, hidden), (pairs, hidden), (pairs, hidden), (hidden, queries)]
    linears += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    block = sum(nf4_bytes(o * i) for o, i in linears) + 2 * hidden * BF16
    adapters = sum(rank * (o + i) for o, i in linears)
    known = Facts(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        vocabulary=vocabulary,
        qkv_linears=3,
        gate_up_linears=2,
        linear_numbers=sum(o * i for o, i in linears),
        has_output_norms=False,
        has_head_norms=False,
        codec="nf4-double-quantized",
        block_bytes=-(-block // (256 * ranks)) * 256 * ranks,
        embedding_bytes=vocabulary * hidden * BF16,
        embedding_on_host=True,
        head_bytes=vocabulary * hidden * BF16,
        rest_bytes=hidden * BF16,
        dummy_weights=True,
        adapter="lora",
        adapted="",
        lora_rank=rank,
        lora_rank_qkv=3 * rank,
        lora_rank_o=rank,
        lora_rank_gate_up=2 * rank,
        lora_rank_down=rank,
        adapter_parameters=adapters,
        largest_adapters=adapters,
        dropout=0.0,
        stream_bytes=BF16,
        compute_bytes=BF16,
        reduce_bytes=FLOAT,
        sent_bytes=FLOAT,
        master_bytes=2,
        optimizer_state_bytes=8,
        batch=batch,
        context=context,
        accumulation=1,
        no_sync=False,
        mean_tokens=0,
        mean_row=0,
        label_share=1.0,
        keys_per_query=keys_seen(context, None),
        ranks=ranks,
        local_ranks=ranks,
        shards=ranks,
        reshard=True,
        exchange_by_host=False,
        fused=True,
        remat=True,
        attention="cudnn",
        multiprocessors=0,
        workspace_bytes=32 << 20,
    )
    return replace(known, **changes)


def gib(nbytes: float) -> float:
    return nbytes / GIB


@dataclass(frozen=True)
class Run:
    """A run that was measured: benchmarks/results/2026-11-22-h200.jsonl."""

    name: str
    facts: Facts
    placement: Placed
    keep: str
    offloaded: bool
    allocated_gib: float
    seconds: float
    attention: tuple[float, float]  # FLOP/s forward and backward at its shape

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.placement, (BlockPlan(True, self.keep, self.offloaded),) * self.facts.layers, True, 0)

    @property
    def rates(self) -> Rates:
        launch = H200.launch * LAUNCHES_THEN / LAUNCHES_NOW
        return replace(H200, attention_forward=self.attention[0], attention_backward=self.attention[1], launch=launch)


TERA, GIGA = 1e12, 1e9
# The H200s of those runs, before calibration was there, from their other measurements: products by shape and attention
# (cuDNN) as a whole step's parts took one by one, decoding and copying per op, the link and NCCL without peer access on
# the home rig. Not measured apart: `crowding` is what NCCL's 16 or so of 132 multiprocessors make, and `launch` is what
# the row of 1 x 512 gives, which the host bounds; that row shows no more than that the others do not contradict it.
H200 = Rates(
    matmul_forward=710 * TERA,
    matmul_backward=689 * TERA,
    attention_forward=550 * TERA,
    attention_backward=393 * TERA,
    copy=4260 * GIGA,
    dequantize=3875 * GIGA,
    h2d=55 * GIGA,
    h2d_both=38 * GIGA,
    d2h_both=38 * GIGA,
    gather=25 * GIGA,
    reduce=25 * GIGA,
    crowding=1.15,
    launch=36e-6,
)
LONG_8B, SHORT_8B = (550 * TERA, 393 * TERA), (250 * TERA, 180 * TERA)
LONG_70B, SHORT_70B = (523 * TERA, 393 * TERA), (229 * TERA, 156 * TERA)
B8, B70 = "llama3_8b", "llama2_70b"
MEASURED = [
    Run("8B 4x2048 all", facts(B8, 4, 2048, 16), "replicate", "all", False, 29.148, 0.4786, LONG_8B),
    Run("8B 4x2048 input", facts(B8, 4, 2048, 16), "replicate", "input", False, 8.290, 0.6272, LONG_8B),
    Run("8B 8x512 halves", facts(B8, 8, 512, 16), "replicate", "halves", False, 7.653, 0.3041, SHORT_8B),
    Run(
        "8B 4x2048 attention, offloaded", facts(B8, 4, 2048, 16), "replicate", "attention", True, 6.552, 0.6028, LONG_8B
    ),
    Run("8B 1x512 input", facts(B8, 1, 512, 16), "replicate", "input", False, 5.701, 0.1599, SHORT_8B),
    Run("70B 2x512", facts(B70, 2, 512, 64, 2), "shard_offload", "input", False, 11.365, 1.9392, SHORT_70B),
    Run("70B 2x2048", facts(B70, 2, 2048, 64, 2), "shard_offload", "input", False, 15.9, 3.082, LONG_70B),
]
