"""A decoder block over kept keys and values: of whole prompts that lie one after the other, or of a token a row.

T tokens, H hidden, N query heads, K key/value heads, D head dim, B rows.
"""

from dataclasses import dataclass, field

from torch import Tensor

from fsdp_qlora.generation.cache import KVCache
from fsdp_qlora.generation.step_linears import StepLinears
from fsdp_qlora.kernels.attention import Stats
from fsdp_qlora.kernels.cached_attention import attend_cached
from fsdp_qlora.kernels.glu import glu_forward
from fsdp_qlora.kernels.rope import rope_
from fsdp_qlora.kernels.segments import Segments
from fsdp_qlora.models.fused.attention import AttentionHalf
from fsdp_qlora.models.fused.gated_mlp import GatedMlpHalf
from fsdp_qlora.models.fused.half import Dropout, PassContext, ResidualStream
from fsdp_qlora.models.fused.projection import norm_forward
from fsdp_qlora.models.fused.scratch import WeightScratch
from fsdp_qlora.models.fused.spec import BlockSpec


@dataclass
class CurrentPass:
    """What the pass that runs now is over; all blocks share it."""

    cache: KVCache
    places: Tensor | None = None  # int64 [T], where the tokens' keys are kept; None: nowhere
    segments: Segments | None = None  # of the prompts; None: the tokens are one of each row, in order
    seen: Tensor | None = field(default=None)  # int64 [B], of such a token: keys of its row, its own included


class _PromptAttention(AttentionHalf):
    """An attention half that keeps what it has of each token."""

    def __init__(self, spec: BlockSpec, scratch: WeightScratch, backend: str, block: int, now: CurrentPass) -> None:
        super().__init__(spec.attention, scratch, backend)
        self.block, self.now = block, now

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: PassContext) -> tuple[Tensor, Stats]:
        if self.now.places is not None:
            self.now.cache.write(self.block, self.now.places, k[0], v[0])
        return super()._attend(q, k, v, context)


class CachedBlock:
    """The forward of one block, called as a fused one with h [1, T, H] and a line of cos and sin for each token."""

    def __init__(self, spec: BlockSpec, scratch: WeightScratch, backend: str, block: int, now: CurrentPass) -> None:
        self.spec, self.block, self.now = spec, block, now
        self.prompt_attention = _PromptAttention(spec, scratch, backend, block, now)
        self.prompt_mlp = GatedMlpHalf(spec.mlp, scratch)
        self.qkv, self.o = StepLinears(spec.attention.qkv, scratch), StepLinears((spec.attention.o,), scratch)
        self.gate_up, self.down = StepLinears(spec.mlp.gate_up, scratch), StepLinears((spec.mlp.down,), scratch)

    @property
    def linears(self) -> tuple[StepLinears, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def __call__(self, h: Tensor, cos: Tensor, sin: Tensor, segments: Segments | None = None) -> Tensor:
        if self.now.segments is None:
            return self._step(h.reshape(-1, h.shape[-1]), cos, sin).view(h.shape)
        context = PassContext((1, h.shape[1]), (cos, sin), Dropout(0.0, 0), self.now.segments)
        stream, _ = self.prompt_attention.forward(ResidualStream(h.reshape(-1, h.shape[-1])), context)
        return self.prompt_mlp.forward(stream, context)[0].hidden

    def _step(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [B, H] of one new token of each row."""
        spec, mlp = self.spec.attention, self.spec.mlp
        added = self.o(self._attended(self.qkv(norm_forward(h, spec.norm)), cos, sin))
        if spec.out_norm is not None:
            added = norm_forward(added, spec.out_norm)
        normed = norm_forward(added, mlp.norm, residual=h, sum_out=added)  # added is the sum from here on
        gate_up = self.gate_up(normed)
        inner = self.down.in_features
        down = self.down(glu_forward(gate_up[:, :inner], gate_up[:, inner:], mlp.activation))
        if mlp.out_norm is not None:
            down = norm_forward(down, mlp.out_norm)
        return down.add_(added)

    def _attended(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return attention's output [B, N*D] from qkv [B, (N + 2K)*D]; keeps the new keys and values."""
        spec, now = self.spec.attention, self.now
        size = spec.head_dim
        widths = [spec.heads * size, spec.kv_heads * size, spec.kv_heads * size]
        q, k, v = (piece.view(1, qkv.shape[0], -1, size) for piece in qkv.split(widths, dim=1))
        if spec.q_norm is not None and spec.k_norm is not None:
            q, k = norm_forward(q, spec.q_norm), norm_forward(k, spec.k_norm)
        rope_(q, k, cos, sin)
        assert now.places is not None
        assert now.seen is not None
        now.cache.write(self.block, now.places, k[0], v[0])
        keys, values = now.cache.keys[self.block], now.cache.values[self.block]
        return attend_cached(q[0], keys, values, now.seen, spec.masking).view(qkv.shape[0], -1)
