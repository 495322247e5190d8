"""What fused blocks and the head take and cost, read off the program itself: their passes run on the meta device.

Nothing about a block is written down a second time here: a change of the program is one of the plan. All kinds of
block of a shape are traced in 0.1 s, once per process and, on a GPU, once for all starts (`remembered.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.attention_on_meta import keys_seen, splitting_over
from fsdp_qlora.kernels.cost import Cost
from fsdp_qlora.kernels.cross_entropy import linear_cross_entropy
from fsdp_qlora.kernels.device import deterministic
from fsdp_qlora.kernels.lora_wide import wide
from fsdp_qlora.kernels.rms_norm import rms_norm
from fsdp_qlora.models.causal_lm import Picked
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.plan.inputs import Facts, adapter_columns
from fsdp_qlora.plan.metering import Meter, rounded
from fsdp_qlora.plan.remembered import remembered
from fsdp_qlora.plan.shape import META, Shape, block_of, dtype_of, shape_of

Kind = tuple[str, bool]  # keep level, offloaded


@dataclass(frozen=True)
class BlockCost:
    """Of a block on one rank."""

    kept: int  # bytes on the GPU from its forward to its backward
    away: int  # bytes in host memory meanwhile
    # Bytes of working tensors at the worst moment of each pass, beside what is kept (backward: by this block too) and
    # what is on its way from or to host memory.
    forward_bytes: int
    backward_bytes: int
    loose: int  # most bytes of what operators allocate by themselves
    forward: Cost
    backward: Cost  # what it recomputes included
    once: Cost = field(default_factory=Cost)  # beside them in the first forward of a step: of magnitudes


@dataclass(frozen=True)
class HeadCost:
    """Of the final norm, the head and the loss, both passes, beside what the blocks keep; every token is a label."""

    arena: int  # bytes at the worst moment, of tensors that are placed
    loose: int  # bytes at the worst moment, of others
    cost: Cost


def block_costs(facts: Facts) -> dict[Kind, BlockCost]:
    """Return what a fused block of these facts takes and costs, at each keep level, offloaded or not.

    It takes what the largest micro-batch does, and costs what the usual one does."""
    largest = _traced(shape_of(facts), facts.batch, facts.context, deterministic())
    usual, length = largest, facts.context
    if facts.mean_tokens:
        usual, length = _traced(shape_of(facts), 1, facts.mean_tokens, deterministic()), facts.mean_tokens
    share = facts.keys_per_query / keys_seen(length, None)  # of the keys: rows end and blocks may have windows
    return {
        kind: replace(takes, forward=_seen(usual[kind].forward, share), backward=_seen(usual[kind].backward, share))
        for kind, takes in largest.items()
    }


def head_cost(facts: Facts, normed: bool = True) -> HeadCost:
    """Return what the head takes and costs; without its norm where that is Hugging Face's.

    It takes memory as if every token of the largest micro-batch were a label, and costs what the usual labels do."""
    largest = _head(facts.hidden, facts.vocabulary, facts.compute_bytes, facts.tokens, normed)
    labels = max(1, round(facts.usual_tokens * facts.label_share))
    usual = _head(facts.hidden, facts.vocabulary, facts.compute_bytes, labels, normed)
    return replace(largest, cost=usual.cost)


def _seen(cost: Cost, share: float) -> Cost:
    return replace(cost, attention=cost.attention * share, attention_backward=cost.attention_backward * share)


@lru_cache(256)
def _traced(shape: Shape, batch: int, context: int, repeatable: bool) -> dict[Kind, BlockCost]:
    """repeatable: whether bits are to repeat, for which more is copied; part of what a trace depends on."""

    def traced() -> list[Any]:
        with splitting_over(shape.multiprocessors):
            return [[*map(asdict, trace(block_of(shape), batch, context, keep))] for keep in Keep]

    kept = remembered("trace", lambda: [shape._asdict(), batch, context], traced)
    return {
        (keep.label, offloaded): _cost(**cost)
        for keep, costs in zip(Keep, kept, strict=True)
        for offloaded, cost in zip((False, True), costs, strict=True)
    }


def _cost(forward: dict[str, float], backward: dict[str, float], once: dict[str, float], **sizes: int) -> BlockCost:
    return BlockCost(forward=Cost(**forward), backward=Cost(**backward), once=Cost(**once), **sizes)


def trace(block: FusedBlock, batch: int, context: int, keep: Keep) -> tuple[BlockCost, BlockCost]:
    """Return what a block on the meta device costs whose kept tensors stay on the GPU, and whose are offloaded."""
    block = block.keeping(keep)
    magnitudes = any(linear.lora_magnitude_vector is not None for linear in block.spec.linears)
    if magnitudes or not block.shared.weights.buffer.numel():
        _passes(block, batch, context)  # makes the scratch buffer as large as it will be, and memory for factors
    for linear in block.spec.linears:
        linear.values_change()
    first = _passes(block, batch, context)
    here = _passes(block, batch, context) if magnitudes else first
    here = replace(here, loose=max(here.loose, first.loose), once=first.forward - here.forward)
    return here, _offloaded(block, batch, context, here)


def _passes(block: FusedBlock, batch: int, context: int) -> BlockCost:
    with metered(block, batch * context) as meter:
        h, tables = pass_inputs(block, batch, context, meter)
        meter.mark()
        meter.loose.begin()
        meter.cost()
        out = block(h, *tables)
        forward_bytes, forward, out_bytes = meter.peak, meter.cost(), rounded(out.nbytes)
        d_out = output_gradient(block, out)
        held = meter.mark() - rounded(d_out.untyped_storage().nbytes())
        out.backward(d_out[:, : h.shape[-1]].view(out.shape))
        backward_bytes = meter.peak - held
        found = BlockCost(held - out_bytes, 0, forward_bytes, backward_bytes, meter.loose.peak, forward, meter.cost())
        del out, d_out, h
        release(block)
    return found


def _offloaded(block: FusedBlock, batch: int, context: int, here: BlockCost) -> BlockCost:
    """Return what a block costs that keeps its tensors in host memory. here: on the GPU."""
    away = _HostMemory()
    block = block.keeping(block.keep, away, offloads=True)  # type: ignore[arg-type]
    with metered(block, batch * context) as meter:
        h, tables = pass_inputs(block, batch, context, meter)
        meter.mark()
        block(h, *tables)
        forward_bytes = max(here.forward_bytes, meter.peak)
    return replace(here, kept=here.kept - away.nbytes, away=away.nbytes, forward_bytes=forward_bytes)


@lru_cache(256)
def _head(hidden: int, vocabulary: int, compute_bytes: int, tokens: int, normed: bool) -> HeadCost:
    dtype = dtype_of(compute_bytes)
    weight, norm = (torch.empty(*shape, dtype=dtype, device=META) for shape in ((vocabulary, hidden), (hidden,)))
    places = torch.empty(tokens, dtype=torch.int64, device=META)
    meter = Meter([weight, norm, places], tokens)
    with meter.counting():
        h = meter((tokens, hidden), dtype, META).requires_grad_()  # of the last block: no block keeps it
        meter.mark()
        meter.cost()
        rows = Picked.apply(h, places)
        rows = rms_norm(rows, norm, 1e-5) if normed else rows
        linear_cross_entropy(rows, weight, places, label_count=tokens).backward()
    return HeadCost(meter.peak, meter.loose.peak, meter.cost())


def pass_inputs(block: FusedBlock, batch: int, context: int, meter: Meter) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return (h [B, S, H], the rotary tables)."""
    h = meter((batch, context, block.spec.mlp.down.out_features), block.dtype, META).requires_grad_()
    cos, sin = (torch.empty(context, block.spec.attention.head_dim // 2, device=META) for _ in range(2))
    meter.loose.know([cos, sin, block.shared.weights.buffer])
    return h, (cos, sin)


def output_gradient(block: FusedBlock, out: Tensor) -> Tensor:
    """Return the gradient of a block's output with room beside it, as the block after leaves it."""
    rows = out.flatten(0, 1)
    d_wide = wide(rows.shape[0], rows.shape[1] + block.mlp.padding, rows)
    block.shared.gradient.hand(d_wide)
    return d_wide


def release(block: FusedBlock) -> None:
    """Free what a block's passes have left behind."""
    block.shared.gradient.forget()
    for linear in block.spec.linears:
        for parameter in linear.adapter_parameters().values():
            parameter.grad = None


class _HostMemory:
    """Takes what is offloaded and notes how much that is."""

    nbytes = 0

    def offload(self, tensors: list[Tensor], tokens: int) -> None:
        self.nbytes = sum(rounded(t.nbytes) for t in tensors)


@contextmanager
def metered(block: FusedBlock, tokens: int) -> Iterator[Meter]:
    """Count what passes of this block on the meta device take and cost that run within it."""
    attention, mlp = block.spec.attention, block.spec.mlp
    frozen = attention.o.weight.home
    with frozen.on_meta():
        adapters = [p for linear in block.spec.linears for p in linear.adapter_parameters().values()]
        by_input = (attention.qkv, (attention.o,), mlp.gate_up, (mlp.down,))
        columns = max(sum(m.lora_A.shape[0] for m in linears if m.lora_A is not None) for linears in by_input)
        meter = Meter([frozen.flat, block.shared.weights.buffer, *adapters], tokens, adapter_columns(columns))
        with meter.counting():
            yield meter
