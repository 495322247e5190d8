"""A decoder block as one autograd function that decides what it saves for backward, over fused kernels.

    h2 = h + o(attention(rope(qkv(norm(h)))))          h3 = h2 + down(act(gate(n)) * up(n)),  n = norm(h2)

What is saved besides the block's input is a choice (`Keep`): more memory for less recomputation. Backward recomputes
the rest with the same kernels, so what it sees is what forward saw, and it never redoes the output projections o and
down (but for o at level INPUT, which does not save h2). Where o's output is saved, h2 is not: it is their sum again.
No generic checkpoint decides what is freed.

T tokens (B*S), H hidden.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.device import empty_like, no_autocast
from fsdp_qlora.kernels.segments import Segments
from fsdp_qlora.memory.activation_offload import ActivationOffload
from fsdp_qlora.models.fused.attention import AttentionHalf, AttentionSaved
from fsdp_qlora.models.fused.copies import own
from fsdp_qlora.models.fused.gated_mlp import GatedMlpHalf, GatedMlpSaved
from fsdp_qlora.models.fused.half import Dropout, Half, PassContext, ResidualStream
from fsdp_qlora.models.fused.saved import SavedBlock
from fsdp_qlora.models.fused.scratch import Shared
from fsdp_qlora.models.fused.spec import BlockSpec


@dataclass(frozen=True)
class FusedBlock:
    """The passes of one block. Called with h [B, S, H] and float32 tables cos, sin [S, D/2].

    segments: bounds of documents that lie one after the other in h [1, T, H]; the tables have a line a token then."""

    spec: BlockSpec
    keep: Keep
    shared: Shared
    backend: str  # of attention, see kernels/attention.py
    offload: ActivationOffload | None = None  # host memory for what blocks of the model save, this one or others
    offloads: bool = False  # True: what this block saves is offloaded
    copies_input: bool = False  # True: its input's memory is not the block's to hold until the step's end

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.shared.weights.dtype

    @cached_property
    def attention(self) -> AttentionHalf:
        """The first half."""
        return AttentionHalf(self.spec.attention, self.shared.weights, self.backend)

    @cached_property
    def mlp(self) -> Half[GatedMlpSaved]:
        """The second half."""
        return GatedMlpHalf(self.spec.mlp, self.shared.weights)

    def __call__(self, h: Tensor, cos: Tensor, sin: Tensor, segments: Segments | None = None) -> Tensor:
        linears = self.spec.linears
        parameters = [p for linear in linears for p in linear.adapter_parameters().values()]
        p = max(linear.dropout for linear in linears) if any(linear.training for linear in linears) else 0.0
        seed = int(torch.randint(1 << 62, ()).item()) if p else 0
        context = PassContext((h.shape[0], h.shape[1]), (cos, sin), Dropout(p, seed), segments)
        block = self if torch.is_grad_enabled() else self.without_backward
        with no_autocast(h):  # as in backward, which recomputes: a product stays float32
            out: Tensor = _Fused.apply(h, block, context, *parameters)
        return out

    def keeping(self, keep: Keep, offload: ActivationOffload | None = None, offloads: bool = False) -> "FusedBlock":
        """Return this block with another choice of what it saves. Arguments as the fields."""
        return replace(self, keep=keep, offload=offload, offloads=offloads)

    @cached_property
    def without_backward(self) -> "FusedBlock":
        """This block where no backward follows, which saves nothing that it can recompute."""
        return self.keeping(Keep.INPUT, self.offload)

    def padded(self, d_rows: Tensor) -> Tensor:
        """Return d_rows [T, H] with the free columns that the block after left for down's adapter, if it did."""
        if self.spec.mlp.out_norm is not None:  # whose gradient goes to down, in memory of its own
            return d_rows
        d_wide = self.shared.gradient.take(d_rows, d_rows.shape[1] + self.mlp.padding)
        return d_rows if d_wide is None else d_wide

    def input_gradient(self, d_wide: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Return the gradient of the block's input [B, S, H], and leave its free columns to the block before."""
        if d_wide is None:
            return None
        self.shared.gradient.hand(d_wide)
        return d_wide[:, : shape[-1]].view(shape)

    def recompute_h2(
        self, rows: Tensor, saved: AttentionSaved | None, context: PassContext
    ) -> tuple[Tensor, AttentionSaved]:
        """Return (h2 [T, H], what the attention half saves) from the block's input [T, H] and what is `saved`."""
        if saved is None:
            stream, saved = self.attention.forward(ResidualStream(rows), context)
            saved.xs = own(saved.xs)
            added = stream.addend
        elif saved.projected is not None:
            added = self.attention.added(saved.projected)
        assert added is not None
        h2 = empty_like(rows) if saved.projected is added else added
        return torch.add(added, rows, out=h2), saved

    def forget(self) -> None:
        """Release what a pass that failed has left behind, in this block and in what it shares with the others."""
        self.shared.gradient.forget()
        if self.offload is not None:
            self.offload.reset()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, block: FusedBlock, context: PassContext, *parameters: Tensor) -> Tensor:
        h = empty_like(h).copy_(h) if block.copies_input else h
        stream, attention = block.attention.forward(ResidualStream(h.reshape(-1, h.shape[-1])), context)
        attention_saved = block.attention.keep(attention, block.keep)  # now: the MLP needs the memory
        out, mlp = block.mlp.forward(stream, context)
        mlp_saved = block.mlp.keep(mlp, block.keep)
        assert mlp_saved is not None
        h2 = stream.hidden if attention_saved is not None and attention_saved.projected is None else None
        saved = SavedBlock(h, h2, attention_saved, mlp_saved)
        ctx.offloaded = saved.offload(block.offload) if block.offloads and block.offload is not None else None
        ctx.saved, ctx.block, ctx.context = saved, block, context
        return out.hidden

    @staticmethod
    def backward(ctx: Any, d_h3: Tensor) -> tuple[Tensor | None, ...]:
        block, context, saved = ctx.block, ctx.context, ctx.saved
        assert saved is not None, "a fused block runs backward once: gradients have overwritten its activations"
        if ctx.offloaded is not None:
            saved.restore(block.offload, ctx.offloaded)
            ctx.offloaded = None
        elif block.offload is not None:
            block.offload.prefetch()
        h, h2, attention, mlp = saved.h, saved.h2, saved.attention, saved.mlp
        ctx.saved = None
        del saved
        features = h.shape[-1]
        rows, d_rows = h.reshape(-1, features), d_h3.reshape(-1, features)
        d_rows = d_rows if d_rows.stride(1) == 1 else d_rows.contiguous()
        with no_autocast(h):
            if h2 is None:
                h2, attention = block.recompute_h2(rows, attention, context)
            padding = block.attention.padding
            d_h2, mlp_gradients = block.mlp.backward(block.padded(d_rows), h2, mlp, context, padding)
            del h2, mlp
            padding = block.mlp.padding if ctx.needs_input_grad[0] else None
            d_h, gradients = block.attention.backward(d_h2, rows, attention, context, padding)
            d_h = block.input_gradient(d_h, h.shape)
        return d_h, None, None, *(d for adapter in gradients + mlp_gradients for d in adapter)
