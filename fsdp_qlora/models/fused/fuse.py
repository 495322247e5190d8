"""Passes of fused blocks for a model's layers where their family is known: for all of them or none, and why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.options import Config, ModelOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.attention import fastest, for_segments
from fsdp_qlora.kernels.rms_norm import rms_norm
from fsdp_qlora.kernels.segments import Segments
from fsdp_qlora.models.attention import Chooser, choose_backend
from fsdp_qlora.models.causal_lm import CurrentSegments
from fsdp_qlora.models.families import NotFusable, eps_of, recognise
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.fused.scratch import Shared
from fsdp_qlora.models.fused.spec import BlockSpec
from fsdp_qlora.models.generic_block import FrozenLayer
from fsdp_qlora.models.precision import Precision

NO_MASKS = "fsdp_qlora_fused"  # an attention that Hugging Face builds no masks for: fused blocks know what is seen


class FinalNorm(nn.Module):
    """The norm behind the last block, in one kernel. inner: Hugging Face's, whose weight is a view of frozen bytes."""

    def __init__(self, inner: nn.Module, shift: float) -> None:
        super().__init__()
        self.inner, self.eps, self.shift = inner, eps_of(inner), shift

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, cast(Tensor, self.inner.weight), self.eps, shift=self.shift)


@dataclass(frozen=True)
class Fusion:
    """What came of it: how many blocks and projections run fused, with which attention, and why not where not."""

    blocks: int
    projections: int
    attention: tuple[str, ...]  # over rows of one length
    reason: str
    documents: tuple[str, ...] = ()  # attention over rows of other lengths, one after the other

    def __str__(self) -> str:
        if not self.blocks:
            return f"not fused: {self.reason}"
        return (
            f"{self.blocks} blocks and {self.projections} projections fused, "
            f"attention by {' and '.join(self.attention)}"
            + (f" ({' and '.join(self.documents)} over unequal rows)" if self.documents != self.attention else "")
        )


class HalfTables(nn.Module):
    """A rotary embedding's tables in float32, without their repeated half: (cos, sin), each [S, D/2].

    Hugging Face rounds them to the model's dtype, which in bfloat16 turns keys by wrong angles at long context. It
    hands what it gets here to every decoder layer, the bounds of documents with it."""

    def __init__(self, inner: nn.Module, current: CurrentSegments) -> None:
        super().__init__()
        self.inner, self.current = inner, current

    def forward(
        self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor, Segments | None]:
        likeness = torch.empty(0, device=x.device, dtype=torch.float32)
        count, reach = position_ids.shape[-1], self.current.reach
        if reach is not None:  # the table of `dynamic` and `longrope` is that of the last position
            position_ids = nn.functional.pad(position_ids, (0, 1), value=reach - 1)
        cos, sin = self.inner(likeness, position_ids, *args, **kwargs)
        half = cos.shape[-1] // 2
        return cos[0, :count, :half].contiguous(), sin[0, :count, :half].contiguous(), self.current.segments


def fuse(
    config: Config,
    device: torch.device,
    layers: Sequence[FrozenLayer],
    backbone: PreTrainedModel,
    precision: Precision,
    copies_input: bool,
    choose: Chooser = fastest,
) -> tuple[list[FusedBlock], Fusion]:
    """Return the passes of every block, or none where one block cannot have any, and what came of it. Changes nothing.

    copies_input: of the first block, see `FusedBlock`. choose: the attention backend. The blocks keep their input until
    a plan says otherwise. Raises UserError where the options ask for what only fused blocks do, and there are none."""
    options, shape = config.model, (config.training.batch_size, config.data.context_length)
    try:
        specs = _specs(layers, backbone, precision, options)
    except NotFusable as why:
        _check_unfused(config, str(why))
        return [], Fusion(0, 0, (), str(why))
    shared, blocks, documents = Shared.on(device, precision.compute), list[FusedBlock](), list[str]()
    kind = "cuda" if device.type == "meta" else device.type  # the plan of a rig that is not here
    for spec in specs:
        attention = spec.attention
        backend = choose_backend(options.attention, precision, attention, shape, device, choose)
        documents.append(for_segments(backend, kind, precision.compute, attention.head_dim, attention.masking))
        copies = copies_input and not blocks
        blocks.append(FusedBlock(spec, Keep.INPUT, shared, backend, copies_input=copies))
    backends, of_documents = dict.fromkeys(block.backend for block in blocks), dict.fromkeys(documents)
    projections = sum(len(spec.linears) for spec in specs)
    return blocks, Fusion(len(specs), projections, tuple(backends), "", tuple(of_documents))


def serve_fused(backbone: PreTrainedModel, layer: nn.Module, spec: BlockSpec, current: CurrentSegments) -> nn.Module:
    """Let a backbone hand its blocks what fused ones take; take the last norm off it, and return that in one kernel.

    layer, spec: of a block, whose norms the last one must be alike; else it stays, and an identity is returned."""
    backbone.rotary_emb = HalfTables(backbone.rotary_emb, current)
    AttentionInterface.register(NO_MASKS, _unused)
    backbone.config._attn_implementation = NO_MASKS
    norm = backbone.norm
    if not isinstance(norm, nn.Module) or type(norm) is not type(layer.input_layernorm):
        return nn.Identity()
    backbone.norm = nn.Identity()
    return FinalNorm(norm, spec.attention.norm.shift)


def _check_unfused(config: Config, reason: str) -> None:
    """Raise UserError where the options ask for what only fused blocks do."""
    memory = config.memory
    if config.data.packing:
        raise UserError(f"packing: true needs fused blocks, and the model is not fused: {reason}; omit packing")
    if config.model.fused == "true":
        raise UserError(f"fused: true is not possible: {reason}; use --fused auto")
    if memory.use_activation_cpu_offload:
        raise UserError(f"use_activation_cpu_offload: true needs fused blocks, and the model is not fused: {reason}")
    if memory.use_gradient_checkpointing and memory.keep_activations != "auto":
        raise UserError(
            f"keep_activations: {memory.keep_activations} needs fused blocks, and the model is not fused: {reason}"
        )


def _specs(
    layers: Sequence[FrozenLayer], backbone: PreTrainedModel, precision: Precision, options: ModelOptions
) -> list[BlockSpec]:
    """Return the spec of each block. Raises NotFusable where the options or one of the blocks stand in the way."""
    if options.fused == "false":
        raise NotFusable("as asked")
    if options.attention == "eager":
        raise NotFusable("--attention eager is Hugging Face's own")
    if precision.stream != precision.compute:
        stream = str(precision.stream).removeprefix("torch.")
        raise NotFusable(f"precision {options.precision} keeps a {stream} residual stream")
    if not isinstance(getattr(backbone, "rotary_emb", None), nn.Module):
        raise NotFusable("the model has no rotary tables of its own")
    specs = [recognise(of.layer, of.frozen) for of in layers]
    if any(m.lora_magnitude_vector is not None and m.dropout for spec in specs for m in spec.linears):
        raise NotFusable("DoRA's dropout takes a second product with each weight; set lora_dropout to 0")
    return specs


def _unused(*args: object, **kwargs: object) -> None:
    raise AssertionError("a fused block does its own attention")
