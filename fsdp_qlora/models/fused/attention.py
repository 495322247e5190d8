"""The attention half of a fused block: h + o(attention(rope(qkv(norm(h))))).

T tokens (B*S), H hidden, N query heads, K key/value heads, D head dim, R the columns of adapters that read an input.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.attention import BACKENDS, Stats, attend, attend_backward
from fsdp_qlora.kernels.device import empty
from fsdp_qlora.kernels.lora import Gradients, Projection, project
from fsdp_qlora.kernels.lora_wide import (
    adapt_,
    gradient_of_input_wide,
    gradients_of_a_wide,
    gradients_of_b_wide,
    project_wide,
    wide,
)
from fsdp_qlora.kernels.rope import rope_
from fsdp_qlora.models.fused.copies import as_saved, own, own_stats
from fsdp_qlora.models.fused.half import DropoutSite, PassContext, ResidualStream
from fsdp_qlora.models.fused.projection import Linears, norm_backward, norm_forward, normed_wide
from fsdp_qlora.models.fused.scratch import WeightScratch
from fsdp_qlora.models.fused.spec import AttentionSpec


@dataclass
class AttentionSaved:
    """What the attention half holds between its passes. None: to be recomputed."""

    OFFLOADED: ClassVar = ("out", "projected", "qkv")  # at least H numbers per token each

    qkv: Tensor | None = None  # [T, (N + 2K)*D], as projected where the heads have norms, else rotated already
    xs: Tensor | None = None  # see kernels/lora_wide.py
    out: Tensor | None = None  # [B, S, N, D]
    stats: Stats = None
    oa: Tensor | None = None  # xs of o
    projected: Tensor | None = None  # o's output, where a norm follows it or its adapter has a magnitude


class AttentionHalf:
    """The passes of an attention half (`half.Half`). backend: see kernels/attention.py."""

    def __init__(self, spec: AttentionSpec, scratch: WeightScratch, backend: str) -> None:
        self.spec, self.backend = spec, backend
        self.qkv, self.o = Linears(spec.qkv, scratch), Linears((spec.o,), scratch)

    @property
    def padding(self) -> int:
        """Columns for o's adapter."""
        return self.o.padding

    def forward(self, x: ResidualStream, context: PassContext) -> tuple[ResidualStream, AttentionSaved]:
        """Return (the stream with what this half adds to it, everything that backward can use)."""
        spec, saved, qkv = self.spec, AttentionSaved(), self.qkv.projection()
        self._project_qkv(saved, x.normed(spec.norm, self.qkv.padding), qkv, context)
        q, k, v = self._heads(saved, context, rotate=True)
        saved.out, saved.stats = self._attend(q, k, v, context)
        (added,), saved.oa = project(
            _rows(saved.out), [self.o.projection()], scale=spec.o.scale, **context.dropout.at(DropoutSite.O)
        )
        if spec.out_norm is not None or self.o.has_magnitudes:
            saved.projected = added
        return ResidualStream(x.hidden, self.added(added)), saved

    def added(self, projected: Tensor) -> Tensor:
        """Return what this half adds to the stream [T, H], from o's output: that, or in new memory its norm."""
        norm = self.spec.out_norm
        return projected if norm is None else norm_forward(projected, norm)

    def keep(self, saved: AttentionSaved, level: Keep) -> AttentionSaved | None:
        """Release what `level` does not save, and what saved tensors are only views of."""
        saved.qkv, saved.xs = (saved.qkv, own(saved.xs)) if level >= Keep.QKV else (None, None)
        if level < Keep.ATTENTION or BACKENDS[self.backend].saves_inputs:
            saved.out = saved.stats = None
        else:  # the operator's own memory is for its next call
            saved.out, saved.stats = own(saved.out), own_stats(saved.stats)
        return saved if level >= Keep.HALVES else None

    def backward(
        self, d_y: Tensor, x_TH: Tensor, saved: AttentionSaved, context: PassContext, padding: int | None
    ) -> tuple[Tensor | None, Gradients]:
        """Return (d_x, gradients of qkv's and o's adapters) from d_y [T, H + R], R free columns for o's adapter.

        o first: q, k and v, if they are recomputed, are then decoded once for that and for their gradients."""
        spec, features, dropout = self.spec, x_TH.shape[1], context.dropout
        d_out, d_oa, d_b, o_dots = self._through_o(d_y, saved, context)
        qkv = self.qkv.projection()
        y_wide = normed_wide(x_TH, spec.norm, self.qkv.padding)
        laid, q, k, v = self._recompute(saved, y_wide, qkv, context)
        d_a = gradients_of_a_wide(d_oa, _rows(saved.out), self.o.bare(), **dropout.at(DropoutSite.O))
        del d_oa
        assert saved.out is not None
        d_q, d_k, d_v = attend_backward(
            d_out, q, k, v, saved.out, saved.stats, spec.masking, self.backend, context.segments
        )
        del d_out, q, k, v
        saved.out = saved.stats = None
        d_q, d_k = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_q, d_k))
        d_wide, dots = self._through_rotation(d_q, d_k, d_v, saved, context)
        del d_q, d_k, d_v
        assert saved.xs is not None
        outputs = self.qkv.out_features
        d_bs = gradients_of_b_wide(d_wide[:, :outputs], d_wide[:, outputs:], saved.xs, qkv, laid)
        d_as = gradients_of_a_wide(d_wide[:, outputs:], y_wide[:, :features], qkv, **dropout.at(DropoutSite.QKV))
        del y_wide
        gradients = [*self.qkv.gradients(d_as, d_bs, dots), *self.o.gradients(d_a, d_b, o_dots)]
        if padding is None:
            return None, gradients
        d_n = gradient_of_input_wide(d_wide, qkv, laid, **dropout.at(DropoutSite.QKV))
        del d_wide
        d_x = wide(x_TH.shape[0], features + padding, x_TH)
        norm_backward(d_n, x_TH, spec.norm, skip=d_y[:, :features], out=d_x[:, :features])
        return d_x, gradients

    # ---- pieces of backward

    def _through_o(
        self, d_y: Tensor, saved: AttentionSaved, context: PassContext
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """Return (d_out [B, S, N, D], the gradient of o's x A^T [T, R], [d_b of o], `Linears.dots` of o)."""
        spec, features, o = self.spec, self.o.out_features, self.o.bare()
        d_added = d_y
        if spec.out_norm is not None:
            d_added = wide(d_y.shape[0], features + self.o.padding, d_y)
            norm_backward(d_y[:, :features], saved.projected, spec.out_norm, out=d_added[:, :features])
        dots = self.o.dots(d_added[:, :features], saved.projected)
        saved.projected = None
        laid, d_oa = self.o.lay(o), d_added[:, features:]
        d_b = gradients_of_b_wide(d_added[:, :features], d_oa, saved.oa, o, laid)
        d_out = gradient_of_input_wide(d_added, o, laid, **context.dropout.at(DropoutSite.O))
        return d_out.view(*context.shape, spec.heads, spec.head_dim), d_oa, d_b, dots

    def _recompute(
        self, saved: AttentionSaved, y_wide: Tensor, qkv: Projection, context: PassContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (qkv's weights as `lay` has them, q, k, v); fills in what `saved` lacks."""
        if saved.qkv is not None:
            laid = self.qkv.lay(qkv)
            q, k, v = self._heads(saved, context, rotate=False)
        else:
            laid = self._project_qkv(saved, y_wide, qkv, context)
            saved.xs = as_saved(saved.xs)
            q, k, v = self._heads(saved, context, rotate=True)
        if saved.out is None or saved.stats is None:
            saved.out, saved.stats = self._attend(q, k, v, context)
        return laid, q, k, v

    def _through_rotation(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, saved: AttentionSaved, context: PassContext
    ) -> tuple[Tensor, Tensor | None]:
        """Return ([T, (N + 2K)*D + R], the gradient of qkv's output with free columns for its adapters, `Linears.dots`
        of qkv)."""
        spec = self.spec
        if spec.q_norm is None and not self.qkv.has_magnitudes:
            saved.qkv = None
        tokens, outputs = d_q.shape[0] * d_q.shape[1], self.qkv.out_features
        d_wide = wide(tokens, outputs + self.qkv.padding, d_q)
        out_q, out_k, out_v = self._split(d_wide[:, :outputs], context)
        if spec.q_norm is not None and spec.k_norm is not None:
            rope_(d_q, d_k, *context.rotary, backward=True)
            raw_q, raw_k, _ = self._split(saved.qkv, context)
            out_q.copy_(norm_backward(d_q.contiguous(), raw_q, spec.q_norm))
            out_k.copy_(norm_backward(d_k.contiguous(), raw_k, spec.k_norm))
            del raw_q, raw_k
        else:
            rope_(d_q, d_k, *context.rotary, backward=True, out=(out_q, out_k))
            if self.qkv.has_magnitudes:  # as projected: rotated back
                q, k, _ = self._split(saved.qkv, context)
                rope_(q, k, *context.rotary, inverse=True)
        out_v.copy_(d_v)
        dots = self.qkv.dots(d_wide[:, :outputs], saved.qkv)
        saved.qkv = None
        return d_wide, dots

    # ---- pieces of both passes

    def _project_qkv(self, saved: AttentionSaved, y_wide: Tensor, qkv: Projection, context: PassContext) -> Tensor:
        """Fill in saved.qkv and saved.xs; return the weights as `lay` has them."""
        laid = self.qkv.lay(qkv)
        saved.xs = adapt_(y_wide, qkv, laid, **context.dropout.at(DropoutSite.QKV))
        saved.qkv = empty((y_wide.shape[0], self.qkv.out_features), y_wide)
        project_wide(y_wide, qkv, laid, saved.qkv)
        return laid

    def _heads(self, saved: AttentionSaved, context: PassContext, rotate: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v [B, S, heads, D] as attention takes them; rotates saved.qkv in place, unless heads have
        norms."""
        q, k, v = self._split(saved.qkv, context)
        if self.spec.q_norm is not None and self.spec.k_norm is not None:
            q, k = norm_forward(q, self.spec.q_norm), norm_forward(k, self.spec.k_norm)
            rotate = True
        if rotate:
            rope_(q, k, *context.rotary)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: PassContext) -> tuple[Tensor, Stats]:
        """Return (out [B, S, N, D], what backward needs of it)."""
        return attend(q, k, v, self.spec.masking, self.backend, context.segments)

    def _split(self, qkv: Tensor | None, context: PassContext) -> list[Tensor]:
        """Return views of q, k, v [B, S, heads, D]."""
        assert qkv is not None
        spec = self.spec
        widths = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
        return [piece.view(*context.shape, -1, spec.head_dim) for piece in qkv.split(widths, dim=1)]


def _rows(x: Tensor | None) -> Tensor:
    """[B, S, heads, D] -> [T, heads * D]."""
    assert x is not None
    return x.reshape(x.shape[0] * x.shape[1], -1)
