"""A fused block made from numbers alone, so that shapes that nobody has loaded (another context, another rig, a
recorded run) are counted as the program's own blocks are."""

from functools import cache
from typing import NamedTuple

import torch

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.kernels.attention import Masking
from fsdp_qlora.kernels.dora import exact_dtype
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.fused.scratch import Shared
from fsdp_qlora.models.fused.spec import AttentionSpec, BlockSpec, GatedMlpSpec, Norm
from fsdp_qlora.models.generic_block import DeclaredAdapter, FrozenLinear
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.weights.codecs import Plain, codec_named
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor
from fsdp_qlora.weights.layout import Layout

META = torch.device("meta")


class Shape(NamedTuple):
    """The facts that a block's tensors and its work depend on, but for the tokens."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_linears: int
    gate_up_linears: int
    lora_rank: int
    adapted: str
    has_output_norms: bool
    has_head_norms: bool
    codec: str
    compute_bytes: int
    dropout: float
    attention: str
    multiprocessors: int
    adapter: str


def shape_of(facts: Facts) -> Shape:
    return Shape(*(getattr(facts, name) for name in Shape._fields))


def dtype_of(nbytes: int) -> torch.dtype:
    return torch.bfloat16 if nbytes == 2 else torch.float32


@cache
def block_of(shape: Shape) -> FusedBlock:
    """Return a block of that shape on the meta device."""
    s, dtype = shape, dtype_of(shape.compute_bytes)
    codec = codec_named(s.codec)
    queries, pairs = s.heads * s.head_dim, s.kv_heads * s.head_dim
    linears = {"o": (s.hidden, queries), "down": (s.hidden, s.intermediate)}
    linears |= {"q": (queries, s.hidden), "k": (pairs, s.hidden), "v": (pairs, s.hidden)}
    linears |= {"qkv": (queries + 2 * pairs, s.hidden), "gate_up": (2 * s.intermediate, s.hidden)}
    linears |= {"gate": (s.intermediate, s.hidden), "up": (s.intermediate, s.hidden)}
    qkv = ("q", "k", "v") if s.qkv_linears == 3 else ("qkv",)
    gate_up = ("gate", "up") if s.gate_up_linears == 2 else ("gate_up",)
    order = (*qkv, "o", *gate_up, "down")
    norms = {"norm": s.hidden, "head_norm": s.head_dim}
    layout = {name: (codec, linears[name]) for name in order} | {n: (Plain(dtype), (w,)) for n, w in norms.items()}
    kind, options = ADAPTERS[s.adapter], AdapterOptions(lora_rank=s.lora_rank)
    if kind.reads_norms:
        layout |= {f"{name}.row_norms": (Plain(exact_dtype(dtype)), linears[name][:1]) for name in order}
    frozen = FrozenBytes(Layout(layout))
    made = dict[str, FrozenLinear]()
    for name, adapted in zip(order, s.adapted or "1" * len(order), strict=True):
        of_rows = FrozenTensor(frozen, f"{name}.row_norms") if kind.reads_norms else None
        adapter = DeclaredAdapter(kind.parameters(*linears[name], options), 1.0, s.dropout, of_rows)
        made[name] = FrozenLinear(FrozenTensor(frozen, name), None, dtype, adapter if adapted == "1" else None)
    norm, head_norm = (Norm(FrozenTensor(frozen, name), 1e-5, 0.0) for name in norms)
    spec = BlockSpec(
        AttentionSpec(
            norm=norm,
            out_norm=norm if s.has_output_norms else None,
            q_norm=head_norm if s.has_head_norms else None,
            k_norm=head_norm if s.has_head_norms else None,
            qkv=tuple(made[name] for name in qkv),
            o=made["o"],
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            masking=Masking(1.0),
        ),
        GatedMlpSpec(
            norm=norm,
            out_norm=norm if s.has_output_norms else None,
            gate_up=tuple(made[name] for name in gate_up),
            down=made["down"],
            activation="silu",
        ),
    )
    return FusedBlock(spec, Keep.INPUT, Shared.on(META, dtype), s.attention or "cudnn")  # generic blocks name none
