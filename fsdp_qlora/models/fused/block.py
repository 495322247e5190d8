"""A decoder block as one autograd function that decides what it keeps for backward, over fused kernels.

    h2 = h + o(attention(rope(qkv(norm(h)))))          h3 = h2 + down(act(gate(n)) * up(n)),  n = norm(h2)

What is kept beside the block's input is a choice (`KEEP`): more memory for less recomputation. Backward computes the
rest again with the same kernels, so what it sees is what forward saw, and it never redoes the output projections o and
down (but for o at level `input`, whose h2 must come from somewhere). Nothing is left to a generic checkpoint to free.

T tokens (B*S), H hidden, N query heads, K key/value heads, D head dim, I intermediate, R rank.
"""

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fsdp_qlora.kernels.attention import Stats, attend, attend_backward
from fsdp_qlora.kernels.device import deterministic, empty, empty_like, no_autocast
from fsdp_qlora.kernels.glu import glu_backward_, glu_forward
from fsdp_qlora.kernels.lora import Adapter, Gradients, Projection, project
from fsdp_qlora.kernels.lora_wide import (
    PITCH,
    adapt_,
    add_adapters_,
    extra,
    fits_glu,
    glu_backward_wide_,
    gradient_of_input_beside,
    gradient_of_input_wide,
    gradient_of_xa_wide,
    gradients_of_a_wide,
    gradients_of_b_wide,
    lay,
    pays_beside,
    products_of_b,
    project_wide,
    wide,
)
from fsdp_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from fsdp_qlora.kernels.rope import rope_
from fsdp_qlora.memory.activation_offload import ActivationOffload, Parked
from fsdp_qlora.models.families import Anatomy, Norm
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.weights.frozen_bytes import decode_rows

# What a block keeps, each level what the one before it keeps and more, in numbers per token:
# input: h [H].  halves: + h2 [H].  attention: + its output and row sums [N*D].  qkv: + q, k, v [(N + 2K)*D].
# all: + gate, up [2I].  Where norms follow o and down (Gemma 2, 3), what down gave is kept at each level as well [H],
# and what o gave from halves on [H]. The adapters' x A^T, R numbers each, hardly count.
KEEP = ("input", "halves", "attention", "qkv", "all")

Tables = tuple[Tensor, Tensor]  # float32 cos and sin [S, D/2]
Dropout = tuple[float, int]  # the adapters' probability, and the seed of the block's pass
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


class Scratch:
    """What all blocks share: a buffer for decoded weights, for on one stream each is used before the next is written;
    and the room that a block's backward leaves beside its gradient for the adapter of the block before.

    What backward uses twice, for a product that it computes again and for its gradient, it decodes once, and nothing
    else between the two."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.empty(0, dtype=dtype, device=device)
        self._handed: Tensor | None = None

    def room(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] with rows on whole cache lines, good until the next call."""
        pitch = -(-columns // PITCH) * PITCH
        numel = rows * pitch
        if self.buffer.numel() < numel:
            self.buffer = self.buffer.new_empty(0)  # freed first: the two never live side by side
            self.buffer = self.buffer.new_empty(numel)
        return self.buffer[:numel].view(rows, pitch)[:, :columns]

    def hand(self, d_wide: Tensor | None) -> None:
        """Before its first columns are returned to autograd as a gradient; None: nothing is handed over."""
        self._handed = d_wide

    def forget(self) -> None:
        """Let go of what was handed over, where no backward will take it."""
        self._handed = None

    def take(self, d_rows: Tensor, columns: int) -> Tensor | None:
        """[T, columns] that begin with d_rows [T, H]: of what was handed over last, if that has as many and they are of
        it; d_rows themselves, if they are enough. None else."""
        d_wide, self._handed = self._handed, None
        if columns == d_rows.shape[1]:
            return d_rows
        if d_wide is None or d_wide.data_ptr() != d_rows.data_ptr() or d_wide.stride() != d_rows.stride():
            return None
        fits = d_wide.shape[0] == d_rows.shape[0] and d_wide.shape[1] >= columns
        return d_wide[:, :columns] if fits else None


@dataclass
class AttentionState:
    """What the attention half holds between its passes. None: to be computed again."""

    qkv: Tensor | None = None  # [T, (N + 2K)*D], as projected where the heads are normalised, else rotated already
    xs: Tensor | None = None  # see kernels/lora_wide.py
    out: Tensor | None = None  # [B, S, N, D]
    stats: Stats = None
    oa: Tensor | None = None  # xs of o
    projected: Tensor | None = None  # o's output, where a norm follows it

    def let_go(self, level: int, backend: str) -> None:
        """Free what that keep level does not keep, and what its tensors are only views of."""
        self.qkv, self.xs = (self.qkv, _own(self.xs)) if level >= KEEP.index("qkv") else (None, None)
        if level < KEEP.index("attention") or backend == "flash_attn":  # its stats hold q, k, v
            self.out = self.stats = None
        else:  # the operator's own memory is for its next call
            self.out, self.stats = _own(self.out), _owned(self.stats)


@dataclass
class MLPState:
    """What the MLP half holds between its passes. None: to be computed again."""

    gate_up: Tensor | None = None  # [T, 2 I + R]: gate, up, and in backward the gradient of x A^T
    xs: Tensor | None = None
    hs: Tensor | None = None
    projected: Tensor | None = None  # down's output, where a norm follows it


@dataclass
class Kept:
    """What a block holds from its forward to its backward."""

    h: Tensor  # [B, S, H]
    h2: Tensor | None
    attention: AttentionState | None
    mlp: MLPState
    # Where what is parked belongs, and its columns: names, not the owners, a circle that would keep tensors alive.
    _away: list[tuple[str, str, int]] = field(default_factory=list)

    def park(self, offload: ActivationOffload) -> Parked:
        """Send everything that has a row of at least H numbers per token to host memory."""
        slots, tokens = self._slots(), self.h.shape[0] * self.h.shape[1]
        self._away = [(name, key, self._owner(name)[key].shape[-1]) for name, key in slots]
        parked = offload.park([_whole_rows(self._owner(name)[key]) for name, key in slots], tokens)
        for name, key in slots:
            self._owner(name)[key] = None
        return parked

    def fetch(self, offload: ActivationOffload, parked: Parked) -> None:
        slots, self._away = self._away, []
        for (name, key, columns), tensor in zip(slots, offload.fetch(parked), strict=True):
            self._owner(name)[key] = tensor if tensor.shape[-1] == columns else tensor[..., :columns]

    def _slots(self) -> list[tuple[str, str]]:
        """(owner, key) of each large tensor."""
        places = [("", "h"), ("", "h2")]
        if self.attention is not None:
            places += [("attention", key) for key in ("out", "projected", "qkv")]
        places += [("mlp", "gate_up"), ("mlp", "projected")]
        return [(name, key) for name, key in places if self._owner(name)[key] is not None]

    def _owner(self, name: str) -> dict[str, Any]:
        return vars(getattr(self, name)) if name else vars(self)


@dataclass(frozen=True)
class FusedBlock:
    """The passes of one block. `keep`: one of `KEEP`. Called with h [B, S, H] and float32 tables cos, sin [S, D/2]."""

    anatomy: Anatomy
    dtype: torch.dtype
    keep: str
    scratch: Scratch
    backend: str  # of attention, see kernels/attention.py
    offload: ActivationOffload | None = None  # host memory where what blocks keep can wait
    parks: bool = False  # whether what this one keeps does
    copies_input: bool = False  # whether its input was made by others, who have its memory until the step's end
    _without_bias: dict[tuple[FrozenLinear, ...], Projection] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        linears = self.anatomy.linears
        matrices = [m for linear in linears if linear.lora_A is not None for m in (linear.lora_A, linear.lora_B)]
        p = max(linear.dropout for linear in linears) if any(linear.training for linear in linears) else 0.0
        seed = int(torch.randint(1 << 62, ()).item()) if p else 0
        block = self if torch.is_grad_enabled() else replace(self, parks=False)  # no backward would fetch it
        with no_autocast(h):  # as in backward, which recomputes: a product stays float32
            out: Tensor = _Fused.apply(h, block, cos, sin, (p, seed), *matrices)
        return out

    def forget(self) -> None:
        """Let go of what a pass that failed has left behind, in this block and in what it shares with the others."""
        self.scratch.forget()
        if self.offload is not None:
            self.offload.reset()

    # ---- the attention half

    def attention_forward(
        self, h: Tensor, shape: tuple[int, int], rotary: Tables, drop: Dropout
    ) -> tuple[Tensor, AttentionState]:
        """(what is added to h [T, H], everything backward can use)."""
        state, qkv = AttentionState(), self.projection(*self.anatomy.qkv)
        self._project_qkv(state, self._normed(h, self.anatomy.attention_norm, qkv), qkv, drop)
        q, k, v = self._heads(state, shape, rotary, rotate=True)
        state.out, state.stats = attend(q, k, v, self.anatomy.masking, self.backend)
        o, scale = self.projection(self.anatomy.o), self.anatomy.o.scale
        (added,), state.oa = project(self._rows(state.out), [o], p=drop[0], seed=drop[1] + 1, scale=scale)
        if self.anatomy.attention_out_norm is not None:
            state.projected = added
            added = self._norm(added, self.anatomy.attention_out_norm)
        return added, state

    def attention_backward(
        self,
        d_h2: Tensor,
        o: Projection,
        h: Tensor,
        state: AttentionState,
        shape: tuple[int, int],
        rotary: Tables,
        drop: Dropout,
        room: int | None,
    ) -> tuple[Tensor | None, Gradients]:
        """(d_h [T, H], gradients of qkv's and o's adapters) from d_h2 [T, H + R], the whole gradient reaching h2 with
        room beside it for o's adapter. o first: q, k and v, if they are computed again, are then decoded once for that
        and for their gradients.

        room: columns to leave beside d_h for the block before, see `Scratch.hand`; None: d_h is not wanted."""
        anatomy, (p, seed), features = self.anatomy, drop, h.shape[1]
        d_added, d_h2 = d_h2, d_h2[:, :features]
        if anatomy.attention_out_norm is not None:
            d_added = wide(h.shape[0], features + extra(o), h)
            self._norm_backward(d_h2, state.projected, anatomy.attention_out_norm, out=d_added[:, :features])
        laid, d_oa = self._lay((anatomy.o,), o), d_added[:, features:]
        d_b = gradients_of_b_wide(d_added[:, :features], d_oa, state.oa, o, laid)
        d_out = gradient_of_input_wide(d_added, o, laid, p=p, seed=seed + 1)
        d_out = d_out.view(*shape, anatomy.heads, anatomy.head_dim)
        del d_added
        qkv = self.projection(*anatomy.qkv)
        y_wide = self._normed(h, anatomy.attention_norm, qkv)
        rotated = state.qkv is not None
        laid = self._lay(anatomy.qkv, qkv) if rotated else self._project_qkv(state, y_wide, qkv, drop)
        state.xs = state.xs if rotated else _as_kept(state.xs)
        q, k, v = self._heads(state, shape, rotary, rotate=not rotated)
        if state.out is None or state.stats is None:
            state.out, state.stats = attend(q, k, v, anatomy.masking, self.backend)
        d_a = gradients_of_a_wide(d_oa, self._rows(state.out), o, p=p, seed=seed + 1)
        del d_oa
        d_q, d_k, d_v = attend_backward(d_out, q, k, v, state.out, state.stats, anatomy.masking, self.backend)
        del d_out, q, k, v
        state.out = state.stats = None
        d_q, d_k = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_q, d_k))
        out_features = sum(linear.out_features for linear in anatomy.qkv)
        if anatomy.q_norm is None:
            state.qkv = None
        d_wide = wide(h.shape[0], out_features + extra(qkv), h)
        d_out, d_xa = d_wide[:, :out_features], d_wide[:, out_features:]
        place_q, place_k, place_v = self._split(d_out, shape)
        if anatomy.q_norm is not None and anatomy.k_norm is not None:
            rope_(d_q, d_k, *rotary, backward=True)
            raw_q, raw_k, _ = self._split(state.qkv, shape)
            place_q.copy_(self._norm_backward(d_q.contiguous(), raw_q, anatomy.q_norm))
            place_k.copy_(self._norm_backward(d_k.contiguous(), raw_k, anatomy.k_norm))
            del raw_q, raw_k
            state.qkv = None
        else:
            rope_(d_q, d_k, *rotary, backward=True, out=(place_q, place_k))
        place_v.copy_(d_v)
        del d_q, d_k, d_v
        assert state.xs is not None
        d_bs = gradients_of_b_wide(d_out, d_xa, state.xs, qkv, laid)
        d_as = gradients_of_a_wide(d_xa, y_wide[:, : h.shape[1]], qkv, p=p, seed=seed)
        del y_wide
        gradients = [*zip(d_as, d_bs, strict=True), *zip(d_a, d_b, strict=True)]
        if room is None:
            return None, gradients
        d_y = gradient_of_input_wide(d_wide, qkv, laid, p=p, seed=seed)
        del d_wide, d_out, d_xa, place_q, place_k, place_v
        d_h_wide = wide(h.shape[0], features + room, h)
        d_h = self._norm_backward(d_y, h, anatomy.attention_norm, skip=d_h2, out=d_h_wide[:, :features])
        self.scratch.hand(d_h_wide)
        return d_h, gradients

    def _project_qkv(self, state: AttentionState, y_wide: Tensor, qkv: Projection, drop: Dropout) -> Tensor:
        """Fills the state's qkv and xs; the weights as `lay` has them."""
        laid = self._lay(self.anatomy.qkv, qkv)
        state.xs = adapt_(y_wide, qkv, laid, p=drop[0], seed=drop[1])
        state.qkv = empty((y_wide.shape[0], laid.shape[0] - extra(qkv)), y_wide)
        project_wide(y_wide, qkv, laid, state.qkv)
        return laid

    def _heads(
        self, state: AttentionState, shape: tuple[int, int], rotary: Tables, rotate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, S, heads, D] as attention takes them; rotates what is kept, in place, unless heads have norms."""
        q, k, v = self._split(state.qkv, shape)
        if self.anatomy.q_norm is not None and self.anatomy.k_norm is not None:
            q, k = self._norm(q, self.anatomy.q_norm), self._norm(k, self.anatomy.k_norm)
            rotate = True
        if rotate:
            rope_(q, k, *rotary)
        return q, k, v

    def _split(self, qkv: Tensor | None, shape: tuple[int, int]) -> list[Tensor]:
        assert qkv is not None
        a = self.anatomy
        widths = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
        return [piece.view(*shape, -1, a.head_dim) for piece in qkv.split(widths, dim=1)]

    # ---- the MLP half

    def mlp_forward(self, n_wide: Tensor, gate_up: Projection, h2: Tensor, h3: Tensor, drop: Dropout) -> MLPState:
        """Writes h3 [T, H], from n, h2 normalised with room beside it; returns everything backward can use."""
        state, (p, seed) = MLPState(), drop
        self._project_gate_up(state, n_wide, gate_up, drop)
        down = self.projection(self.anatomy.down)
        inner = self.anatomy.down.in_features
        middle = wide(n_wide.shape[0], inner + extra(down), n_wide)
        glu_forward(*self._gate_and_up(state), self.anatomy.activation, out=middle[:, :inner])
        laid = self._lay((self.anatomy.down,), down)
        state.hs = _own(adapt_(middle, down, laid, p=p, seed=seed + 3))
        if self.anatomy.mlp_out_norm is not None:
            state.projected = empty_like(h2)
            project_wide(middle, down, laid, state.projected)
            self._norm(state.projected, self.anatomy.mlp_out_norm, out=h3).add_(h2)
        elif down.bias is not None:
            project_wide(middle, down, laid, h3)
            h3.add_(h2)
        else:
            project_wide(middle, down, laid, h3, plus=h2)
        return state

    def mlp_backward(
        self, d_h3: Tensor, h2: Tensor, state: MLPState, down: Projection, o: Projection, drop: Dropout
    ) -> tuple[Tensor, Gradients]:
        """(d_h2 [T, H + R] with room for o's adapter, gradients of gate's, up's and down's adapters). down first: gate
        and up, if they are computed again, are then decoded once for that and for their gradients."""
        anatomy, (p, seed) = self.anatomy, drop
        features, inner = h2.shape[1], anatomy.down.in_features
        assert state.hs is not None
        taken = self.scratch.take(d_h3, features + extra(down)) if anatomy.mlp_out_norm is None else None
        d_wide = wide(d_h3.shape[0], features + extra(down), d_h3) if taken is None else taken
        if anatomy.mlp_out_norm is not None:
            self._norm_backward(d_h3, state.projected, anatomy.mlp_out_norm, out=d_wide[:, :features])
        elif taken is None:
            d_wide[:, :features] = d_h3
        laid, d_ha = self._lay((anatomy.down,), down), d_wide[:, features:]
        d_b = gradients_of_b_wide(d_wide[:, :features], d_ha, state.hs, down, laid)
        middle = gradient_of_input_wide(d_wide, down, laid, p=p, seed=seed + 3)
        d_ha = _own(d_ha) if taken is None else _as_kept(d_ha)
        del d_wide
        gate_up = self.projection(*anatomy.gate_up)
        n_wide = self._normed(h2, anatomy.mlp_norm, gate_up)
        again = state.gate_up is None
        laid = self._project_gate_up(state, n_wide, gate_up, drop) if again else self._lay(anatomy.gate_up, gate_up)
        state.xs = _as_kept(state.xs) if again else state.xs
        assert state.gate_up is not None
        assert state.xs is not None
        d_gate_up = state.gate_up[:, : 2 * inner]  # what gate and up become
        if not p and fits_glu(gate_up, down):
            d_bs, d_a = glu_backward_wide_(middle, d_gate_up, anatomy.activation, state.xs, gate_up, d_ha, down)
            del middle, d_ha
        else:
            glu_backward_(middle, *self._gate_and_up(state), anatomy.activation)  # now the inner activations again
            d_a = gradients_of_a_wide(d_ha, middle, down, p=p, seed=seed + 3)
            del middle, d_ha
            d_bs = products_of_b(d_gate_up, state.xs, gate_up)
        if pays_beside(gate_up, 2 * inner, features) and not p:
            d_n, d_xa = gradient_of_input_beside(d_gate_up, gate_up, laid)
            d_as = gradients_of_a_wide(d_xa, n_wide[:, :features], gate_up, p=p, seed=seed + 2)
            add_adapters_(d_n, d_xa, laid)
        else:
            d_xa = state.gate_up[:, 2 * inner :]
            gradient_of_xa_wide(d_gate_up, d_xa, gate_up, laid)
            d_as = gradients_of_a_wide(d_xa, n_wide[:, :features], gate_up, p=p, seed=seed + 2)
            d_n = gradient_of_input_wide(state.gate_up, gate_up, laid, p=p, seed=seed + 2)
        del n_wide, d_gate_up, d_xa
        state.gate_up = state.xs = None
        d_h2 = wide(h2.shape[0], features + extra(o), h2)
        self._norm_backward(d_n, h2, anatomy.mlp_norm, skip=d_h3, out=d_h2[:, :features])
        return d_h2, [*zip(d_as, d_bs, strict=True), *zip(d_a, d_b, strict=True)]

    def _project_gate_up(self, state: MLPState, n_wide: Tensor, gate_up: Projection, drop: Dropout) -> Tensor:
        """Fills the state's gate_up and xs; the weights as `lay` has them."""
        laid, inner = self._lay(self.anatomy.gate_up, gate_up), self.anatomy.down.in_features
        state.xs = adapt_(n_wide, gate_up, laid, p=drop[0], seed=drop[1] + 2)
        state.gate_up = wide(n_wide.shape[0], 2 * inner + extra(gate_up), n_wide)
        project_wide(n_wide, gate_up, laid, state.gate_up[:, : 2 * inner])
        return laid

    def _gate_and_up(self, state: MLPState) -> tuple[Tensor, Tensor]:
        assert state.gate_up is not None
        inner = self.anatomy.down.in_features
        return state.gate_up[:, :inner], state.gate_up[:, inner : 2 * inner]

    # ---- pieces

    def projection(self, *linears: FrozenLinear) -> Projection:
        """Linears of one input as one: their rows one below the other."""
        if linears not in self._without_bias:
            self._without_bias[linears] = self._bare_projection(linears)
        projection = self._without_bias[linears]
        biases = [linear.bias.decode(self.dtype) for linear in linears if linear.bias is not None]
        if not biases:
            return projection
        assert len(biases) == len(linears), "linears of one input have biases all or none"
        return projection._replace(bias=biases[0] if len(biases) == 1 else torch.cat(biases))

    def _bare_projection(self, linears: tuple[FrozenLinear, ...]) -> Projection:
        adapters, weights, start = [], [linear.weight for linear in linears], 0
        for linear in linears:
            a, b = linear.lora_A, linear.lora_B
            if a is not None and b is not None:
                adapters.append(Adapter(a.detach(), b.detach(), linear.scale, start))
            start += linear.out_features
        features, scratch = linears[0].in_features, self.scratch  # not self, which will hold this function

        def weight(out: Tensor | None = None) -> Tensor:
            out = scratch.room(start, features) if out is None else out
            decode_rows(weights, out)
            return out

        return Projection(weight, None, tuple(adapters))

    def _lay(self, linears: tuple[FrozenLinear, ...], projection: Projection) -> Tensor:
        out_features = sum(linear.out_features for linear in linears)
        return lay(projection, out_features, linears[0].in_features, self.scratch.room)

    def _normed(self, x: Tensor, norm: Norm, consumer: Projection, **options: Tensor | None) -> Tensor:
        """[T, H + R]: x normalised, and room beside it for the adapters of the linears that read it."""
        rows, features = x.shape
        normed = wide(rows, features + extra(consumer), x)
        self._norm(x, norm, out=normed[:, :features], **options)
        return normed

    def _norm(self, x: Tensor, norm: Norm, **options: Tensor | None) -> Tensor:
        return rms_norm_forward(x, norm.weight.decode(self.dtype), norm.eps, norm.shift, **options)

    def _norm_backward(self, d_y: Tensor, x: Tensor | None, norm: Norm, **options: Tensor | None) -> Tensor:
        assert x is not None
        return rms_norm_backward(d_y, x, norm.weight.decode(self.dtype), norm.eps, norm.shift, **options)

    def _rows(self, x: Tensor) -> Tensor:
        """[B, S, heads, D] -> [T, heads * D]."""
        return x.reshape(x.shape[0] * x.shape[1], -1)


def _own(x: MaybeTensor) -> MaybeTensor:
    """A contiguous copy, so that what it lies beside can go."""
    return None if x is None else empty_like(x).copy_(x)


def _owned(stats: Stats) -> Stats:
    """Attention's statistics with copies of its sums by rows; the few integers beside them stay as they are."""
    if isinstance(stats, Tensor):
        if not stats.is_floating_point():
            return stats
        return empty((stats.numel(), 1), stats).view(stats.shape).copy_(stats)  # a last axis that no length changes
    return tuple(_owned(stat) for stat in stats) if isinstance(stats, list | tuple) else stats


def _as_kept(x: MaybeTensor) -> MaybeTensor:
    """Return x with the strides that it has where it was kept, if bits shall not depend on that: for matrices of other
    strides cuBLAS may take another kernel, which sums in another order."""
    return _own(x) if deterministic() else x


def _whole_rows(x: Tensor) -> Tensor:
    """Return what lies in one piece: x, or x [T, C] with what follows each row (`lora_wide.wide`)."""
    return x if x.is_contiguous() else x.as_strided((x.shape[0], x.stride(0)), (x.stride(0), 1))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, block: FusedBlock, cos: Tensor, sin: Tensor, drop: Dropout, *matrices: Tensor
    ) -> Tensor:
        h = empty_like(h).copy_(h) if block.copies_input else h
        shape, rows = (h.shape[0], h.shape[1]), h.reshape(-1, h.shape[-1])
        level = KEEP.index(block.keep)
        added, attention = block.attention_forward(rows, shape, (cos, sin), drop)
        attention.let_go(level, block.backend)  # now: the MLP needs the memory
        h2 = empty_like(rows)
        gate_up = block.projection(*block.anatomy.gate_up)
        n_wide = block._normed(added, block.anatomy.mlp_norm, gate_up, residual=rows, sum_out=h2)
        del added
        h3 = empty_like(h)  # no view itself: FSDP2 hangs its hook on it, and warns of views
        mlp = block.mlp_forward(n_wide, gate_up, h2, h3.view_as(rows), drop)
        mlp.gate_up, mlp.xs = (mlp.gate_up, _own(mlp.xs)) if level >= KEEP.index("all") else (None, None)
        halves = level >= KEEP.index("halves")
        kept = Kept(h, h2 if halves else None, attention if halves else None, mlp)
        ctx.parked = kept.park(block.offload) if block.parks and block.offload is not None else None
        ctx.kept, ctx.block, ctx.rotary, ctx.drop = kept, block, (cos, sin), drop
        return h3

    @staticmethod
    def backward(ctx: Any, d_h3: Tensor) -> tuple[Tensor | None, ...]:
        block, rotary, drop, kept = ctx.block, ctx.rotary, ctx.drop, ctx.kept
        assert kept is not None, "a fused block runs backward once: its activations were overwritten by their gradients"
        if ctx.parked is not None:
            kept.fetch(block.offload, ctx.parked)
            ctx.parked = None
        elif block.offload is not None:
            block.offload.ahead()
        h, h2, attention, mlp = kept.h, kept.h2, kept.attention, kept.mlp
        ctx.kept, shape = None, h.shape[:2]
        del kept
        rows, d_rows = h.reshape(-1, h.shape[-1]), d_h3.reshape(-1, h.shape[-1])
        d_rows = d_rows if d_rows.stride(1) == 1 else d_rows.contiguous()
        with no_autocast(h):
            if h2 is None:
                h2, attention = block.attention_forward(rows, shape, rotary, drop)
                attention.xs = _own(attention.xs)
                h2.add_(rows)
            o, down = (block.projection(linear) for linear in (block.anatomy.o, block.anatomy.down))
            d_h2, mlp_gradients = block.mlp_backward(d_rows, h2, mlp, down, o, drop)
            del h2, mlp
            room = extra(down) if ctx.needs_input_grad[0] else None
            d_h, gradients = block.attention_backward(d_h2, o, rows, attention, shape, rotary, drop, room)
        matrices = [m for pair in gradients + mlp_gradients for m in pair]
        return None if d_h is None else d_h.view(h.shape), None, None, None, None, *matrices
