"""What a fused block is built from: linears, norms and sizes of its halves. `families.py` reads them off a layer."""

from dataclasses import dataclass

from fsdp_qlora.kernels.attention import Masking
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.weights.frozen_bytes import FrozenTensor


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: y = x / rms(x) * (weight + shift)."""

    weight: FrozenTensor
    eps: float
    shift: float


@dataclass(frozen=True)
class AttentionSpec:
    """An attention half: h + o(attention(rope(qkv(norm(h)))))."""

    norm: Norm
    out_norm: Norm | None  # of o's output
    q_norm: Norm | None  # of each query head
    k_norm: Norm | None
    qkv: tuple[FrozenLinear, ...]  # a linear each, or one for all three with their rows one below the other
    o: FrozenLinear
    heads: int
    kv_heads: int
    head_dim: int
    masking: Masking

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        """The half's linears, in the order in which they are used."""
        return (*self.qkv, self.o)


@dataclass(frozen=True)
class GatedMlpSpec:
    """A gated MLP half: h + down(activation(gate(n)) * up(n)), n = norm(h)."""

    norm: Norm
    out_norm: Norm | None  # of down's output
    gate_up: tuple[FrozenLinear, ...]  # a linear each, or one for both with their rows one below the other
    down: FrozenLinear
    activation: str  # as `kernels/glu.py` names it

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        """The half's linears, in the order in which they are used."""
        return (*self.gate_up, self.down)


@dataclass(frozen=True)
class BlockSpec:
    """A decoder block: an attention half, then an MLP half."""

    attention: AttentionSpec
    mlp: GatedMlpSpec

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        """The block's linears, in the order in which they are used."""
        return (*self.attention.linears, *self.mlp.linears)
