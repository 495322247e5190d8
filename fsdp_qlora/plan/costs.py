"""Bytes that a fused block and the head take, read off the program itself: their passes run on the meta device.

A block of the run's shape is made from `Facts` alone, so that shapes that nobody has loaded (another context, another
rig, a recorded run) are counted in the same way. What it asks of `kernels.device.empty` lies in the arena; what
PyTorch's operators allocate by themselves, attention's own for the most part, is loose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsdp_qlora.adapters.lora import lora_shapes
from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.attention import Masking
from fsdp_qlora.kernels.attention_on_meta import splitting_over
from fsdp_qlora.kernels.cross_entropy import linear_cross_entropy
from fsdp_qlora.kernels.device import take_from
from fsdp_qlora.kernels.lora_wide import wide
from fsdp_qlora.kernels.rms_norm import rms_norm
from fsdp_qlora.models.causal_lm import Picked
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.fused.scratch import Shared
from fsdp_qlora.models.fused.spec import AttentionSpec, BlockSpec, GatedMlpSpec, Norm
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.weights.codecs import NF4, Codec, Plain
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor
from fsdp_qlora.weights.layout import Layout

META = torch.device("meta")
ROUND = 512  # bytes: what a tensor's place is a multiple of, in the arena and in PyTorch's allocator


@dataclass(frozen=True)
class BlockBytes:
    """Of a block on one rank. kept: on the GPU from its forward to its backward; away: in host memory meanwhile.

    forward, backward: working tensors at the worst moment of each pass, beside what is kept (backward: by this block
    too) and what is on its way from or to host memory. loose: most of what operators allocate by themselves."""

    kept: int
    away: int
    forward: int
    backward: int
    loose: int


class Shape(NamedTuple):
    """The facts that a block's memory depends on."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_linears: int
    gate_up_linears: int
    rank: int
    adapted: str
    norms_after: bool
    head_norms: bool
    codec: str
    compute_bytes: int
    dropout: float
    attention: str
    multiprocessors: int


def block_bytes(facts: Facts, keep: str, offloaded: bool) -> BlockBytes:
    """Return what a fused block of these facts takes at a keep level."""
    return _traced(
        Shape(*(getattr(facts, name) for name in Shape._fields)), facts.batch, facts.context, keep, offloaded
    )


@lru_cache(4096)
def _traced(shape: Shape, batch: int, context: int, keep: str, offloaded: bool) -> BlockBytes:
    block = replace(_block(shape), keep=Keep.named(keep))
    if offloaded:
        return trace_parked(block, batch, context, _traced(shape, batch, context, keep, False))
    with splitting_over(shape.multiprocessors):
        return trace(block, batch, context)


def trace(block: FusedBlock, batch: int, context: int) -> BlockBytes:
    """Return the bytes of a block on the meta device whose kept tensors stay where they are."""
    with _metered(block) as meter:
        for _ in range(2):  # the first makes the scratch buffer as large as it will be
            h, tables = _inputs(block, batch, context, meter)
            meter.mark()
            meter.loose.begin()
            out = block(h, *tables)
            forward, out_bytes = meter.peak, _rounded(out.nbytes)
            d_out = _gradient(block, out)
            held = meter.mark() - _rounded(d_out.untyped_storage().nbytes())
            out.backward(d_out[:, : h.shape[-1]].view(out.shape))
            found = BlockBytes(held - out_bytes, 0, forward, meter.peak - held, meter.loose.peak)
            del out, d_out, h
            _let_go(block)
    return found


def trace_parked(block: FusedBlock, batch: int, context: int, here: BlockBytes) -> BlockBytes:
    """Return the bytes of a block on the meta device that keeps its tensors in host memory. here: on the GPU."""
    away = _Away()
    block = replace(block, offload=away, parks=True)  # type: ignore[arg-type]
    with _metered(block) as meter:
        h, tables = _inputs(block, batch, context, meter)
        block(h, *tables)
        for _ in range(2):
            h, tables = _inputs(block, batch, context, meter)
            meter.mark()
            meter.loose.begin()
            out = block(h, *tables)
            forward = meter.peak
            del out, h
    return replace(here, kept=here.kept - away.nbytes, away=away.nbytes, forward=max(here.forward, forward))


@lru_cache(256)
def _head(hidden: int, vocabulary: int, compute_bytes: int, tokens: int, normed: bool) -> tuple[int, int]:
    dtype = _dtype(compute_bytes)
    weight, norm = (torch.empty(*shape, dtype=dtype, device=META) for shape in ((vocabulary, hidden), (hidden,)))
    places = torch.empty(tokens, dtype=torch.int64, device=META)
    meter = _Meter([weight, norm, places])
    with meter.counting():
        h = meter((tokens, hidden), dtype, META).requires_grad_()
        before = meter.mark()
        rows = Picked.apply(h, places)
        rows = rms_norm(rows, norm, 1e-5) if normed else rows
        linear_cross_entropy(rows, weight, places, label_count=tokens).backward()
    return meter.peak - before, meter.loose.peak


def head_bytes(facts: Facts) -> tuple[int, int]:
    """Return (in the arena, loose) of the final norm, the head and the loss at their worst moment, beside what the
    blocks keep. Every token is a label."""
    return _head(facts.hidden, facts.vocabulary, facts.compute_bytes, facts.tokens, facts.fused)


# ---- a block from numbers


@cache
def _block(shape: Shape) -> FusedBlock:
    s, dtype = shape, _dtype(shape.compute_bytes)
    codec: Codec = NF4(True) if s.codec.startswith("nf4") else Plain(dtype)
    queries, pairs = s.heads * s.head_dim, s.kv_heads * s.head_dim
    linears = {"o": (s.hidden, queries), "down": (s.hidden, s.inner)}
    linears |= {"q": (queries, s.hidden), "k": (pairs, s.hidden), "v": (pairs, s.hidden)}
    linears |= {"qkv": (queries + 2 * pairs, s.hidden), "gate_up": (2 * s.inner, s.hidden)}
    linears |= {"gate": (s.inner, s.hidden), "up": (s.inner, s.hidden)}
    qkv = ("q", "k", "v") if s.qkv_linears == 3 else ("qkv",)
    gate_up = ("gate", "up") if s.gate_up_linears == 2 else ("gate_up",)
    order = (*qkv, "o", *gate_up, "down")
    norms = {"norm": s.hidden, "head_norm": s.head_dim}
    layout = {name: (codec, linears[name]) for name in order} | {n: (Plain(dtype), (w,)) for n, w in norms.items()}
    frozen = FrozenBytes(Layout(layout))
    made = {name: FrozenLinear(FrozenTensor(frozen, name), None, dtype) for name in order}
    for name, adapted in zip(order, s.adapted or "1" * len(order), strict=True):
        if adapted == "1":
            made[name].add_adapter(lora_shapes(*linears[name], s.rank), 1.0, s.dropout)
    norm, head_norm = (Norm(FrozenTensor(frozen, name), 1e-5, 0.0) for name in norms)
    spec = BlockSpec(
        AttentionSpec(
            norm=norm,
            out_norm=norm if s.norms_after else None,
            q_norm=head_norm if s.head_norms else None,
            k_norm=head_norm if s.head_norms else None,
            qkv=tuple(made[name] for name in qkv),
            o=made["o"],
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            masking=Masking(1.0),
        ),
        GatedMlpSpec(
            norm=norm,
            out_norm=norm if s.norms_after else None,
            gate_up=tuple(made[name] for name in gate_up),
            down=made["down"],
            activation="silu",
        ),
    )
    return FusedBlock(spec, Keep.INPUT, Shared.on(META, dtype), s.attention)


def _dtype(nbytes: int) -> torch.dtype:
    return torch.bfloat16 if nbytes == 2 else torch.float32


def _inputs(block: FusedBlock, batch: int, context: int, meter: "_Meter") -> tuple[Tensor, list[Tensor]]:
    """(h [B, S, H], the rotary tables)."""
    h = meter((batch, context, block.spec.mlp.down.out_features), block.dtype, META).requires_grad_()
    tables = [torch.empty(context, block.spec.attention.head_dim // 2, device=META) for _ in range(2)]
    meter.loose.know([*tables, block.shared.weights.buffer])
    return h, tables


def _gradient(block: FusedBlock, out: Tensor) -> Tensor:
    """The gradient of a block's output with room beside it, as the block after leaves it."""
    rows = out.flatten(0, 1)
    d_wide = wide(rows.shape[0], rows.shape[1] + block.mlp.padding, rows)
    block.shared.gradient.hand(d_wide)
    return d_wide


def _let_go(block: FusedBlock) -> None:
    block.shared.gradient.forget()
    for linear in block.spec.linears:
        for matrix in (linear.lora_A, linear.lora_B):
            if matrix is not None:
                matrix.grad = None


class _Away:
    """Stands for host memory: takes what is parked and notes how much that is."""

    nbytes = 0

    def park(self, tensors: list[Tensor], tokens: int) -> None:
        self.nbytes = sum(_rounded(t.nbytes) for t in tensors)


# ---- counting


class _Loose(TorchDispatchMode):
    """Bytes of meta tensors that operators make, beside those that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.aside = False  # what is made now does not count
        self._known: dict[int, Any] = {}  # storages, held: another's would get their number
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def know(self, tensors: list[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self._known[storage._cdata] = StorageWeakRef(storage)
            self._made.pop(storage._cdata, None)  # scratch, which grew

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or self.aside):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    self._note(tensor.untyped_storage())
            self.peak = max(self.peak, self.live())
        return out

    def _note(self, storage: Any) -> None:
        known = self._known.get(storage._cdata)
        if (known is None or known.expired()) and storage.nbytes():
            self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def begin(self) -> None:
        """What is alive now is there to stay, and counts no more."""
        self.live()
        self._known |= {key: storage for key, (storage, _) in self._made.items()}
        self._made, self.peak = {}, 0

    def live(self) -> int:
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(_rounded(nbytes) for _, nbytes in self._made.values())


class _Meter:
    """Source of meta tensors (`device.take_from`) that counts the bytes alive; beside it, what is loose."""

    def __init__(self, known: list[Tensor]) -> None:
        self.peak = 0
        self.loose = _Loose()
        self.loose.know(known)
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._number = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        self.loose.aside = True
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.loose.aside = False
        self.loose.know([tensor])
        self._number += 1
        self._alive[self._number] = StorageWeakRef(tensor.untyped_storage()), _rounded(tensor.nbytes)
        self.peak = max(self.peak, self.live())
        return tensor

    def live(self) -> int:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())

    def mark(self) -> int:
        """Begin to look for the peak anew; return the bytes alive now."""
        self.peak = self.live()
        return self.peak

    @contextmanager
    def counting(self) -> Iterator[None]:
        take_from(self)
        try:
            with self.loose:
                yield
        finally:
            take_from(None)


@contextmanager
def _metered(block: FusedBlock) -> Iterator[_Meter]:
    linears = block.spec.linears
    frozen = linears[0].weight.home
    with frozen.on_meta():
        matrices = [m for linear in linears for m in (linear.lora_A, linear.lora_B) if m is not None]
        meter = _Meter([frozen.flat, block.shared.weights.buffer, *matrices])
        with meter.counting():
            yield meter


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ROUND) * ROUND
