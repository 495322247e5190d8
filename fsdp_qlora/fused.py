"""A decoder block as one autograd function that decides what it keeps for backward, over fused kernels.

    h2 = h + o(attention(rope(qkv(norm(h)))))          h3 = h2 + down(act(gate(n)) * up(n)),  n = norm(h2)

What is kept beside the block's input is a choice (`KEEP`): more memory for less recomputation. Backward computes the
rest again with the same kernels, so what it sees is what forward saw, and it never redoes the output projections o and
down (but for o at level `input`, whose h2 must come from somewhere). Nothing is left to a generic checkpoint to free.

T tokens (B*S), H hidden, N query heads, K key/value heads, D head dim, I intermediate, R rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.block import FrozenLinear
from fsdp_qlora.codecs import Plain
from fsdp_qlora.frozen import FrozenTensor
from fsdp_qlora.kernels.attention import attend, attend_backward
from fsdp_qlora.kernels.glu import glu_backward_, glu_forward
from fsdp_qlora.kernels.lora import (
    Adapter,
    Gradients,
    Projection,
    gradient_of_input,
    gradients_of_a,
    gradients_of_b,
    project,
    project_backward,
)
from fsdp_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from fsdp_qlora.kernels.rope import rope_
from fsdp_qlora.recognise import Anatomy, Norm

# What a block keeps, each level what the one before it keeps and more, in numbers per token:
# input: h [H].  halves: + h2 [H].  attention: + its output and row sums [N*D].  qkv: + q, k, v [(N + 2K)*D].  all: + gate, up [2I].
KEEP = ("input", "halves", "attention", "qkv", "all")


class Scratch:
    """One buffer for decoded weights, shared by all blocks: on one stream each is used up before the next is written."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def decode(self, weight: FrozenTensor, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in `dtype`, good until the next call."""
        home, entry = weight.home, weight.home.layout.entries[weight.name]
        parts = home.parts(weight.name)
        if isinstance(entry.codec, Plain):
            return entry.codec.decode(parts, entry.shape, dtype)
        numel = torch.Size(entry.shape).numel()
        if self._buffer is None or self._buffer.numel() < numel or self._buffer.dtype != dtype:
            self._buffer = None  # freed first: the two never live side by side
            self._buffer = torch.empty(numel, dtype=dtype, device=next(iter(parts.values())).device)
        return entry.codec.decode(parts, entry.shape, dtype, out=self._buffer[:numel].view(entry.shape))


@dataclass
class AttentionState:
    """What the attention half holds between its passes. None: to be computed again."""

    qkv: list[Tensor] | None = None  # as projected where the heads are normalised, else rotated already
    xa: Tensor | None = None
    out: Tensor | None = None  # [B, S, N, D]
    stats: Any = None
    oa: Tensor | None = None
    projected: Tensor | None = None  # o's output, where a norm follows it


@dataclass
class MLPState:
    gate_up: list[Tensor] | None = None
    xa: Tensor | None = None
    ha: Tensor | None = None
    projected: Tensor | None = None


@dataclass(frozen=True)
class FusedBlock:
    """The passes of one block. `keep`: one of `KEEP`. Called with h [B, S, H] and float32 tables cos, sin [S, D/2]."""

    anatomy: Anatomy
    dtype: torch.dtype
    keep: str
    scratch: Scratch
    backend: str  # of attention, see kernels/attention.py

    def __call__(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        linears = self.anatomy.linears
        matrices = [m for linear in linears if linear.lora_A is not None for m in (linear.lora_A, linear.lora_B)]
        p = max(linear.dropout for linear in linears) if any(linear.training for linear in linears) else 0.0
        seed = int(torch.randint(1 << 62, ()).item()) if p else 0
        return _Fused.apply(h, self, cos, sin, (p, seed), *matrices)

    # ---- the attention half

    def attention_forward(
        self, h: Tensor, shape: tuple[int, int], rotary: Any, drop: Any
    ) -> tuple[Tensor, AttentionState]:
        """(what is added to h [T, H], everything backward can use)."""
        state = AttentionState()
        self._project_qkv(state, self._norm(h, self.anatomy.attention_norm), drop)
        q, k, v = self._heads(state, shape, rotary, rotate=True)
        state.out, state.stats = attend(q, k, v, self.anatomy.masking, self.backend)
        (added,), state.oa = project(
            self._rows(state.out), [self._projection(self.anatomy.o)], p=drop[0], seed=drop[1] + 1
        )
        if self.anatomy.attention_out_norm is not None:
            state.projected = added
            added = self._norm(added, self.anatomy.attention_out_norm)
        return added, state

    def attention_backward(
        self, d_h2: Tensor, h: Tensor, state: AttentionState, shape: tuple[int, int], rotary: Any, drop: Any
    ) -> tuple[Tensor, Gradients]:
        """(d_h [T, H], gradients of qkv's and o's adapters) from d_h2, the whole gradient reaching h2."""
        anatomy, (p, seed) = self.anatomy, drop
        y = self._norm(h, anatomy.attention_norm)
        rotated = state.qkv is not None
        if state.qkv is None:
            self._project_qkv(state, y, drop)
        q, k, v = self._heads(state, shape, rotary, rotate=not rotated)
        if state.out is None or state.stats is None:
            state.out, state.stats = attend(q, k, v, anatomy.masking, self.backend)
        d_added = d_h2
        if anatomy.attention_out_norm is not None:
            d_added = self._norm_backward(d_h2, state.projected, anatomy.attention_out_norm)
        o = [self._projection(anatomy.o)]
        d_oa, d_b = gradients_of_b([d_added], state.oa, o)
        d_a = gradients_of_a(d_oa, self._rows(state.out), o, p=p, seed=seed + 1)
        d_out = gradient_of_input([d_added], d_oa, o, p=p, seed=seed + 1).view(state.out.shape)
        d_q, d_k, d_v = attend_backward(d_out, q, k, v, state.out, state.stats, anatomy.masking, self.backend)
        del d_out, q, k, v
        d_q, d_k = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_q, d_k))
        rope_(d_q, d_k, *rotary, backward=True)
        if anatomy.q_norm is not None and anatomy.k_norm is not None:
            raw_q, raw_k, _ = self._split(state.qkv, shape)
            d_q = self._norm_backward(d_q.contiguous(), raw_q, anatomy.q_norm)
            d_k = self._norm_backward(d_k.contiguous(), raw_k, anatomy.k_norm)
        d_outs = [self._rows(d) for d in (d_q, d_k, d_v)]
        if len(anatomy.qkv) == 1:
            d_outs = [torch.cat(d_outs, dim=1)]
        d_y, gradients = project_backward(
            d_outs, y, state.xa, [self._projection(m) for m in anatomy.qkv], p=p, seed=seed
        )
        d_h = self._norm_backward(d_y, h, anatomy.attention_norm, skip=d_h2)
        return d_h, gradients + list(zip(d_a, d_b, strict=True))

    def _project_qkv(self, state: AttentionState, y: Tensor, drop: Any) -> None:
        state.qkv, state.xa = project(y, [self._projection(m) for m in self.anatomy.qkv], p=drop[0], seed=drop[1])

    def _heads(
        self, state: AttentionState, shape: tuple[int, int], rotary: Any, rotate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, S, heads, D] as attention takes them; rotates what is kept in place unless heads are normalised."""
        q, k, v = self._split(state.qkv, shape)
        if self.anatomy.q_norm is not None and self.anatomy.k_norm is not None:
            q, k = self._norm(q, self.anatomy.q_norm), self._norm(k, self.anatomy.k_norm)
            rotate = True
        if rotate:
            rope_(q, k, *rotary)
        return q, k, v

    def _split(self, qkv: list[Tensor] | None, shape: tuple[int, int]) -> list[Tensor]:
        assert qkv is not None
        a = self.anatomy
        widths = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
        pieces = qkv if len(qkv) == 3 else list(qkv[0].split(widths, dim=1))
        return [piece.view(*shape, -1, a.head_dim) for piece in pieces]

    # ---- the MLP half

    def mlp_forward(self, n: Tensor, drop: Any) -> tuple[Tensor, MLPState]:
        """(what is added to h2 [T, H], everything backward can use) from n, h2 normalised."""
        state = MLPState()
        p, seed = drop
        state.gate_up, state.xa = project(n, [self._projection(m) for m in self.anatomy.gate_up], p=p, seed=seed + 2)
        inner = glu_forward(*self._gate_and_up(state), self.anatomy.activation)
        (added,), state.ha = project(inner, [self._projection(self.anatomy.down)], p=p, seed=seed + 3)
        if self.anatomy.mlp_out_norm is not None:
            state.projected = added
            added = self._norm(added, self.anatomy.mlp_out_norm)
        return added, state

    def mlp_backward(self, d_h3: Tensor, h2: Tensor, state: MLPState, drop: Any) -> tuple[Tensor, Gradients]:
        """(d_h2 [T, H], gradients of gate's, up's and down's adapters)."""
        anatomy, (p, seed) = self.anatomy, drop
        n = self._norm(h2, anatomy.mlp_norm)
        inner = [self._projection(m) for m in anatomy.gate_up]
        down = [self._projection(anatomy.down)]
        if state.gate_up is None:
            state.gate_up, state.xa = project(n, inner, p=p, seed=seed + 2)
        d_added = d_h3
        if anatomy.mlp_out_norm is not None:
            d_added = self._norm_backward(d_h3, state.projected, anatomy.mlp_out_norm)
        d_ha, d_b = gradients_of_b([d_added], state.ha, down)
        middle = gradient_of_input([d_added], d_ha, down, p=p, seed=seed + 3)
        glu_backward_(middle, *self._gate_and_up(state), anatomy.activation)  # now the MLP's inner activations again
        d_a = gradients_of_a(d_ha, middle, down, p=p, seed=seed + 3)
        del middle
        d_outs = state.gate_up  # gate and up have become their gradients
        d_n, gradients = project_backward(d_outs, n, state.xa, inner, p=p, seed=seed + 2)
        d_h2 = self._norm_backward(d_n, h2, anatomy.mlp_norm, skip=d_h3)
        return d_h2, gradients + list(zip(d_a, d_b, strict=True))

    def _gate_and_up(self, state: MLPState) -> tuple[Tensor, Tensor]:
        assert state.gate_up is not None
        gate, up = state.gate_up if len(state.gate_up) == 2 else state.gate_up[0].chunk(2, dim=1)
        return gate, up

    # ---- pieces

    def _projection(self, linear: FrozenLinear) -> Projection:
        adapters = ()
        if linear.lora_A is not None and linear.lora_B is not None:
            adapters = (Adapter(linear.lora_A.detach(), linear.lora_B.detach(), linear.scale),)
        bias = None if linear.bias is None else linear.bias.decode(self.dtype)
        return Projection(lambda: self.scratch.decode(linear.weight, self.dtype), bias, adapters)

    def _norm(self, x: Tensor, norm: Norm, **options: Any) -> Tensor:
        return rms_norm_forward(x, norm.weight.decode(self.dtype), norm.eps, norm.shift, **options)

    def _norm_backward(self, d_y: Tensor, x: Tensor | None, norm: Norm, **options: Any) -> Tensor:
        assert x is not None
        return rms_norm_backward(d_y, x, norm.weight.decode(self.dtype), norm.eps, norm.shift, **options)

    def _rows(self, x: Tensor) -> Tensor:
        """[B, S, heads, D] -> [T, heads * D]."""
        return x.reshape(x.shape[0] * x.shape[1], -1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, block: FusedBlock, cos: Tensor, sin: Tensor, drop: Any, *matrices: Tensor
    ) -> Tensor:
        shape, rows = h.shape[:2], h.reshape(-1, h.shape[-1])
        added, attention = block.attention_forward(rows, shape, (cos, sin), drop)
        h2 = torch.empty_like(rows)
        n = block._norm(added, block.anatomy.mlp_norm, residual=rows, sum_out=h2)
        added, mlp = block.mlp_forward(n, drop)
        h3 = h2.view(h.shape) + added.view(h.shape)  # no view itself: FSDP2 hangs its hook on it, and warns of views
        level = KEEP.index(block.keep)
        if level < KEEP.index("all"):
            mlp.gate_up = mlp.xa = None
        if level < KEEP.index("qkv"):
            attention.qkv = attention.xa = None
        if level < KEEP.index("attention") or block.backend == "flash_attn":  # its stats hold q, k, v
            attention.out = attention.stats = None
        ctx.save_for_backward(h)
        ctx.block, ctx.rotary, ctx.drop = block, (cos, sin), drop
        ctx.h2 = h2 if level >= KEEP.index("halves") else None
        ctx.attention, ctx.mlp = attention if ctx.h2 is not None else None, mlp
        return h3

    @staticmethod
    def backward(ctx: Any, d_h3: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        block, rotary, drop, shape = ctx.block, ctx.rotary, ctx.drop, h.shape[:2]
        rows, d_rows = h.reshape(-1, h.shape[-1]), d_h3.reshape(-1, h.shape[-1]).contiguous()
        h2, attention, mlp = ctx.h2, ctx.attention, ctx.mlp
        assert mlp is not None, "a fused block runs backward once: its activations were overwritten by their gradients"
        ctx.h2 = ctx.attention = ctx.mlp = None
        if h2 is None:
            added, attention = block.attention_forward(rows, shape, rotary, drop)
            h2 = added.add_(rows)
        d_h2, mlp_gradients = block.mlp_backward(d_rows, h2, mlp, drop)
        del h2, mlp
        d_h, gradients = block.attention_backward(d_h2, rows, attention, shape, rotary, drop)
        matrices = [m for pair in gradients + mlp_gradients for m in pair]
        return d_h.view(h.shape), None, None, None, None, *matrices
