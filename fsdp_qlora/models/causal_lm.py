"""The model that trains: a Hugging Face skeleton whose embedding, decoder layers and head read frozen bytes.

The adapters are inside. What is replaced is a module instance, never a class: rotary tables, masks and the order of the
layers stay Hugging Face's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.cross_entropy import linear_cross_entropy
from fsdp_qlora.kernels.device import empty, no_autocast
from fsdp_qlora.kernels.embedding import gather_rows
from fsdp_qlora.kernels.segments import Segments
from fsdp_qlora.memory.activation_offload import ActivationOffload
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.generic_block import Block, FrozenLinear, FrozenViews, FusedForward
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor

LABELS = 256  # whose logits are there at a time, where each label's loss is wanted


@dataclass(frozen=True)
class Unit:
    """What is encoded, moved and placed in one piece.

    sources: entry of the layout -> its name in the checkpoint. norms: entry -> what norms it holds, which no checkpoint
    has. home: "shared" where the placement decides, "device" for
    a few vectors that every rank simply has, "host" for an embedding whose rows are read from host memory.
    """

    name: str
    frozen: FrozenBytes
    sources: dict[str, str]
    home: Literal["shared", "device", "host"] = "shared"
    norms: Mapping[str, "RowNorms"] = field(default_factory=dict)

    @property
    def origins(self) -> dict[str, str]:
        """Return entry -> what it is made from."""
        return self.sources | {name: f"norms of {weight} in {dtype}" for name, (weight, dtype) in self.norms.items()}

    def linear_of(self, norms: str) -> str:
        """Return the path in the Hugging Face model of the linear whose norms an entry holds."""
        return self.sources[self.norms[norms].weight].removesuffix(".weight")


class RowNorms(NamedTuple):
    """The norms by rows of a weight as it is multiplied."""

    weight: str  # its entry in the same layout
    dtype: torch.dtype  # that it is decoded to


class FrozenEmbedding(nn.Module):
    """The token embedding over its own frozen bytes: gathered for the lookup and freed after it, or never on the GPU.

    on_host: the table lies in pinned host memory and the GPU reads just the rows it needs from there, 16 KiB a token at
    70B: 67 MB for 4,096 tokens, where gathering the table moves 524 MB (Llama 2) or 2.1 GB (Llama 3).
    asks_for_gradient: whether the first block makes a gradient of its input. Nothing before it trains, but reentrant
    checkpointing hangs on an input that asks for one.
    """

    def __init__(
        self, inner: nn.Module, frozen: FrozenBytes, views: FrozenViews, on_host: bool, asks_for_gradient: bool
    ) -> None:
        super().__init__()
        self.inner, self.frozen, self.views, self.on_host = inner, frozen, views, on_host
        self.asks_for_gradient = asks_for_gradient

    def forward(self, input_ids: Tensor) -> Tensor:
        with self.frozen.opened(), torch.no_grad():
            if self.on_host:
                hidden = gather_rows(self.frozen.parts("weight")["values"], input_ids)
            else:
                self.views.bind()
                hidden = self.inner(input_ids)
        return hidden.requires_grad_(self.asks_for_gradient and torch.is_grad_enabled())


class Head(nn.Module):
    """LM head and loss in one: the sum of the cross-entropies at the label positions over `divisor`, a float32 scalar.

    The gradient to the hidden states is made in the forward, so backward needs neither the logits nor the head's bytes.
    factor and softcap: what the family does to its logits.
    """

    def __init__(
        self, weight: FrozenTensor, bias: FrozenTensor | None, dtype: torch.dtype, factor: float, softcap: float | None
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.dtype, self.factor, self.softcap = weight, bias, dtype, factor, softcap
        self.frozen = weight.home

    def forward(self, hidden_LH: Tensor, labels_L: Tensor, divisor: float) -> Tensor:
        with self.frozen.opened():
            return linear_cross_entropy(
                hidden_LH.to(self.dtype),
                self.weight.decode(self.dtype),
                labels_L,
                bias=None if self.bias is None else self.bias.decode(self.dtype),
                logit_scale=self.factor,
                softcap=self.softcap,
                divisor=divisor,
                label_count=len(labels_L),
            )

    def logits(self, hidden_LH: Tensor) -> Tensor:
        """Return the logits, float32 [L, V], with what the family does to them."""
        with self.frozen.opened():
            return self._logits(hidden_LH)

    def losses(self, hidden_LH: Tensor, labels_L: Tensor) -> Tensor:
        """Return the cross-entropy of each label, float32 [L]; logits of a few labels are there at a time."""
        with self.frozen.opened():
            pieces = [
                F.cross_entropy(self._logits(hidden), labels, reduction="none")
                for hidden, labels in zip(hidden_LH.split(LABELS), labels_L.split(LABELS), strict=True)
            ]
        return torch.cat(pieces)

    def _logits(self, hidden_LH: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.decode(self.dtype)
        logits_LV = F.linear(hidden_LH.to(self.dtype), self.weight.decode(self.dtype), bias).float()
        if self.factor != 1.0:
            logits_LV *= self.factor
        return logits_LV if self.softcap is None else torch.tanh(logits_LV / self.softcap) * self.softcap


class CurrentSegments:
    """The bounds of documents in the row that a forward is running for; None where a row is a document."""

    segments: Segments | None = None
    reach: int | None = None  # tokens of the longest row that rotary tables are for; None: of those that are passed


class Picked(torch.autograd.Function):
    """Rows of a matrix at places that are all different: index_select, in memory that `kernels.device.empty` gives."""

    @staticmethod
    def forward(ctx: Any, rows_TH: Tensor, places_L: Tensor) -> Tensor:
        ctx.save_for_backward(places_L)
        ctx.count = rows_TH.shape[0]
        out = empty((places_L.numel(), rows_TH.shape[1]), rows_TH)
        return torch.index_select(rows_TH, 0, places_L, out=out)

    @staticmethod
    def backward(ctx: Any, d_LH: Tensor) -> tuple[Tensor, None]:
        (places_L,) = ctx.saved_tensors
        return empty((ctx.count, d_LH.shape[1]), d_LH).zero_().index_copy_(0, places_L, d_LH), None


class CausalModel(nn.Module):
    """tokens -> loss. `units` are its frozen bytes, `blocks` its decoder layers by their path in the HF model.

    final_norm: of labelled rows, where the backbone's last module is not the norm. current: of which fused blocks hear
    with their rotary tables. linear_paths: of every linear in the Hugging Face model, those that do not train included.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        embedding: FrozenEmbedding,
        blocks: dict[str, Block],
        final_norm: nn.Module,
        head: Head,
        units: list[Unit],
        rest: FrozenViews,
        precision: Precision,
        current: CurrentSegments,
        linear_paths: list[str],
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.final_norm = backbone, head, final_norm
        self.embedding, self.blocks, self.units, self.rest = (embedding,), blocks, units, rest
        self.precision, self.current, self.linear_paths = precision, current, linear_paths

    def forward(
        self,
        input_ids: Tensor,
        places_L: Tensor,
        labels_L: Tensor,
        divisor: float,
        segments: Segments | None = None,
    ) -> Tensor:
        """The sum of the L cross-entropies over `divisor`, float32.

        input_ids: int64 [B, S]. places_L: int64 [L], the positions in B*S whose next token is a label. labels_L: int64
        [L], that token. divisor: the label tokens of the whole step, on all ranks (over the loss scale). segments: of
        documents that lie one after the other in input_ids [1, T]; for fused blocks alone.
        """
        self.rest.bind()
        self.current.segments = segments
        positions = {} if segments is None else {"position_ids": segments.positions}
        with self._in_precision(input_ids):
            hidden_TH = self.backbone(input_ids=input_ids, use_cache=False, **positions)[0].flatten(0, 1)
            hidden_LH = Picked.apply(hidden_TH, places_L)
            loss: Tensor = self.head(self.final_norm(hidden_LH), labels_L, divisor)
        return loss

    def logits(self, input_ids: Tensor, places_L: Tensor | None, **given: Any) -> Tensor:
        """Return the logits of the next token, float32 [L, V], without gradients.

        input_ids: int64 [B, S]. places_L: int64 [L], the positions in B*S that are asked for; None: all. given: what
        the Hugging Face model takes beside the tokens (positions, masks, its cache)."""
        self.rest.bind()
        with torch.no_grad(), self._in_precision(input_ids):
            hidden_TH = self.backbone(input_ids=input_ids, **{"use_cache": False, **given})[0].flatten(0, 1)
            hidden_LH = hidden_TH if places_L is None else hidden_TH.index_select(0, places_L)
            return self.head.logits(self.final_norm(hidden_LH))

    def losses(self, input_ids: Tensor, places_L: Tensor, labels_L: Tensor) -> Tensor:
        """Return the cross-entropy of each label, float32 [L], without gradients. Arguments as of `forward`."""
        self.rest.bind()
        self.current.segments = None
        with torch.no_grad(), self._in_precision(input_ids):
            hidden_TH = self.backbone(input_ids=input_ids, use_cache=False)[0].flatten(0, 1)
            return self.head.losses(self.final_norm(hidden_TH.index_select(0, places_L)), labels_L)

    def _in_precision(self, input_ids: Tensor) -> AbstractContextManager[Any]:
        """Return the context that the model's dtypes ask for."""
        kind = input_ids.device.type
        mixed = self.precision.autocast and kind != "meta"
        return torch.autocast(kind, self.precision.compute) if mixed else no_autocast(input_ids)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run what is inside without gradients and dropout; afterwards every module is in the mode that it was in, and
        rotary tables that grow with the longest row so far are as they were."""
        modes = [(module, module.training) for module in self.modules()]
        tables = [(module, dict(module._buffers), _reaches(module)) for module in self.modules() if _reaches(module)]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, buffers, reaches in tables:
                module._buffers.update(buffers)
                vars(module).update(reaches)

    @property
    def fused_blocks(self) -> list[FusedBlock]:
        """The passes of its blocks; empty where these are generic."""
        return [block.fused for block in self.blocks.values() if isinstance(block.fused, FusedBlock)]

    def keep(self, levels: Sequence[tuple[Keep, bool]], offload: ActivationOffload | None) -> None:
        """Let the blocks, which are fused, save what their levels say from the next forward on.

        levels: of each block, with whether what it saves is offloaded. offload: host memory for that, None: none is."""
        pairs = zip(self.fused_blocks, levels, strict=True)
        kept = [own.keeping(keep, offload, offloads) for own, (keep, offloads) in pairs]
        for block, passes in zip(self.blocks.values(), kept, strict=True):
            block.fused = passes

    @contextmanager
    def computing_by(self, passes: Sequence[FusedForward]) -> Iterator[None]:
        """Let these compute the blocks inside, in place of the blocks' own."""
        replaced = [(block, block.fused, other) for block, other in zip(self.blocks.values(), passes, strict=True)]
        try:
            for block, _, other in replaced:
                block.fused = other
            yield
        finally:
            for block, own, _ in replaced:
                block.fused = own

    def is_tied(self) -> bool:
        """Whether the head reads the embedding's bytes."""
        return self.head.frozen is self.embedding[0].frozen

    def linears(self) -> dict[str, FrozenLinear]:
        """Path in the Hugging Face model -> linear, of every linear in the decoder layers, in order."""
        return {f"{path}.{name}": m for path, block in self.blocks.items() for name, m in block.linears().items()}


def _reaches(module: nn.Module) -> dict[str, Any]:
    """Return what a rotary module notes of the longest row so far (transformers' `rope_type` dynamic), by name."""
    kept = ("max_seq_len_cached", "attention_scaling")
    return {name: value for name, value in vars(module).items() if name.endswith(kept)}
