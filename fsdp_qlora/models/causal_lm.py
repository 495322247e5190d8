"""The model that trains: a Hugging Face skeleton whose embedding, decoder layers and head read frozen bytes.

The adapters are inside. What is replaced is a module instance, never a class: rotary tables, masks and the order of the
layers stay Hugging Face's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.base import AdapterKind
from fsdp_qlora.adapters.lora import LoRA, lora_scale
from fsdp_qlora.adapters.targets import choose_targets
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.cross_entropy import linear_cross_entropy
from fsdp_qlora.kernels.device import empty, no_autocast
from fsdp_qlora.kernels.embedding import gather_rows
from fsdp_qlora.models.generic_block import Block, FrozenLinear, FrozenViews
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.models.skeleton import (
    backbone_of,
    decoder_layers,
    head_of,
    is_linear,
    logit_shape,
    path_of,
    persistent_buffers,
)
from fsdp_qlora.weights.codecs import Codec, Plain
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor
from fsdp_qlora.weights.layout import Layout


@dataclass(frozen=True)
class Unit:
    """What is encoded, moved and placed in one piece.

    sources: entry of the layout -> its name in the checkpoint. home: "shared" where the placement decides, "device" for
    a few vectors that every rank simply has, "host" for an embedding whose rows are read from host memory.
    """

    name: str
    frozen: FrozenBytes
    sources: dict[str, str]
    home: Literal["shared", "device", "host"] = "shared"


class FrozenEmbedding(nn.Module):
    """The token embedding over its own frozen bytes: gathered for the lookup and freed after it, or never on the GPU.

    on_host: the table lies in pinned host memory and the GPU reads just the rows it needs from there, 16 KiB a token at
    70B: 67 MB for 4,096 tokens, where gathering the table moves 524 MB (Llama 2) or 2.1 GB (Llama 3).
    """

    def __init__(self, inner: nn.Module, frozen: FrozenBytes, views: FrozenViews, on_host: bool) -> None:
        super().__init__()
        self.inner, self.frozen, self.views, self.on_host = inner, frozen, views, on_host
        # Nothing before the first block trains, but reentrant checkpointing hangs on an input that asks for a gradient.
        self.asks_for_gradient = True

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
    """tokens -> loss. `units` are its frozen bytes, `blocks` its decoder layers by their path in the HF model."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        embedding: FrozenEmbedding,
        blocks: dict[str, Block],
        head: Head,
        units: list[Unit],
        rest: FrozenViews,
        precision: Precision,
        linear_paths: list[str],
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.final_norm: nn.Module = nn.Identity()  # of labelled rows, where the backbone's last module is not the norm
        self.embedding, self.blocks, self.units, self.rest = (embedding,), blocks, units, rest
        self.precision = precision
        self.linear_paths = linear_paths  # of every linear in the Hugging Face model, those that do not train included

    def forward(self, input_ids: Tensor, places_L: Tensor, labels_L: Tensor, divisor: float) -> Tensor:
        """The sum of the L cross-entropies over `divisor`, float32.

        input_ids: int64 [B, S]. places_L: int64 [L], the positions in B*S whose next token is a label. labels_L: int64
        [L], that token. divisor: the label tokens of the whole step, on all ranks (over the loss scale).
        """
        self.rest.bind()
        kind = input_ids.device.type
        mixed = self.precision.autocast and kind != "meta"
        with torch.autocast(kind, self.precision.compute) if mixed else no_autocast(input_ids):
            hidden_TH = self.backbone(input_ids=input_ids, use_cache=False)[0].flatten(0, 1)
            hidden_LH = Picked.apply(hidden_TH, places_L)
            loss: Tensor = self.head(self.final_norm(hidden_LH), labels_L, divisor)
        return loss

    def is_tied(self) -> bool:
        """Whether the head reads the embedding's bytes."""
        return self.head.frozen is self.embedding[0].frozen

    def linears(self) -> dict[str, FrozenLinear]:
        """Path in the Hugging Face model -> linear, of every linear in the decoder layers, in order."""
        return {f"{path}.{name}": m for path, block in self.blocks.items() for name, m in block.linears().items()}


@dataclass(frozen=True)
class Recipe:
    """How a model's pieces are made.

    codec_of: checkpoint name of a decoder linear's weight -> how it is stored. remat: see `Block`. shards: number of
    ranks among which each unit's bytes must divide evenly. host_embedding: whether an embedding that is not also the
    head stays in host memory. own_head: whether the head has its own weights whatever the config says.
    is_quantized: whether the checkpoint holds the weight of that name quantized. buffers: whether persistent buffers
    are in it, or keep their first values. adapter: what trains.
    """

    precision: Precision
    codec_of: Callable[[str], Codec]
    remat: str | None
    shards: int
    host_embedding: bool = False
    own_head: bool = False
    is_quantized: Callable[[str], bool] = lambda name: False
    buffers: bool = False
    adapter: AdapterKind = field(default_factory=LoRA)


def assemble(model: PreTrainedModel, recipe: Recipe, adapter: AdapterOptions) -> CausalModel:
    """Replace a skeleton's embedding, decoder layers and head by ours and declare the adapters. Nothing has values yet.

    Raises UserError for an architecture whose layers are not plain linears, and for target modules that match nothing.
    """
    path, layers = decoder_layers(model)
    names = [
        f"{path}.{i}.{name}" for i, layer in enumerate(layers) for name, m in layer.named_modules() if is_linear(m)
    ]
    targets = set(choose_targets(adapter.lora_target_modules, names))
    linear_paths = [name for name, m in model.named_modules() if is_linear(m)]
    tied = f"{path_of(model, head_of(model))}.weight" in model.all_tied_weights_keys and not recipe.own_head
    embedding, embedding_unit = _embedding(model, recipe, tied)
    head, head_unit = _head(model, recipe, embedding, tied)
    blocks, units = {}, [embedding_unit]
    for i, layer in enumerate(layers):
        blocks[f"{path}.{i}"], unit = _block(f"{path}.{i}", layer, recipe, adapter, targets)
        units.append(unit)
    model.set_input_embeddings(embedding)
    for i, block in enumerate(blocks.values()):
        layers[i] = block
    rest, rest_unit = _rest(model, recipe)
    units += [u for u in (head_unit, rest_unit) if u is not None]
    return CausalModel(backbone_of(model), embedding, blocks, head, units, rest, recipe.precision, linear_paths)


def _block(
    path: str, layer: nn.Module, recipe: Recipe, adapter: AdapterOptions, targets: set[str]
) -> tuple[Block, Unit]:
    linears = {name: m for name, m in layer.named_modules() if is_linear(m)}
    tensors: dict[str, tuple[Codec, tuple[int, ...]]] = {}
    for name, parameter in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in linears and leaf == "weight":
            quantizes = type(linears[owner]) is nn.Linear or recipe.is_quantized(f"{path}.{name}")
            codec = recipe.codec_of(f"{path}.{name}") if quantizes else Plain(recipe.precision.compute)
            tensors[name] = (codec, tuple(parameter.shape))
        elif parameter.ndim < 2 or "Norm" in type(layer.get_submodule(owner)).__name__:  # Cohere's has a row a head
            tensors[name] = (Plain(recipe.precision.stream), tuple(parameter.shape))
        else:
            raise UserError(
                f"model_name: {path}.{name} {list(parameter.shape)} is a matrix outside nn.Linear "
                f"({type(layer.get_submodule(owner)).__name__}); only decoder layers of plain linears are trained "
                "(no mixture of experts, no convolutions)"
            )
    tensors |= _buffers(layer, recipe)
    frozen = FrozenBytes(Layout(tensors, recipe.shards))
    for name, linear in linears.items():
        ours = _frozen_linear(name, linear, frozen, recipe)
        if f"{path}.{name}" in targets:
            shapes = recipe.adapter.parameters(ours.out_features, ours.in_features, adapter)
            ours.add_adapter(shapes, lora_scale(adapter), adapter.lora_dropout)
        layer.set_submodule(name, ours)
    return Block(layer, frozen, _take_views(layer, frozen), recipe.remat), _unit(path, frozen)


def _frozen_linear(name: str, linear: nn.Module, frozen: FrozenBytes, recipe: Recipe) -> FrozenLinear:
    bias = None if linear.bias is None else FrozenTensor(frozen, f"{name}.bias")
    return FrozenLinear(FrozenTensor(frozen, f"{name}.weight"), bias, recipe.precision.compute)


def _embedding(model: PreTrainedModel, recipe: Recipe, tied: bool) -> tuple[FrozenEmbedding, Unit]:
    inner = model.get_input_embeddings()
    path = path_of(model, inner)
    frozen = FrozenBytes(Layout({"weight": (Plain(recipe.precision.stream), tuple(inner.weight.shape))}, recipe.shards))
    on_host = recipe.host_embedding and type(inner) is nn.Embedding and not tied
    unit = replace(_unit(path, frozen), home="host" if on_host else "shared")
    return FrozenEmbedding(inner, frozen, _take_views(inner, frozen), on_host), unit


def _head(model: PreTrainedModel, recipe: Recipe, embedding: FrozenEmbedding, tied: bool) -> tuple[Head, Unit | None]:
    """The head over its own bytes, or over the embedding's where the two are tied (no unit of its own then)."""
    inner = head_of(model)
    factor, softcap = logit_shape(model.config)
    dtype = recipe.precision.compute
    if tied:
        if inner.bias is not None:
            raise UserError(
                f"model_name: {type(model).__name__} ties its head to its embedding and gives it a bias as well"
            )
        return Head(FrozenTensor(embedding.frozen, "weight"), None, dtype, factor, softcap), None
    shapes = {"weight": (inner.out_features, inner.in_features), "bias": (inner.out_features,)}  # not the embedding's
    tensors = {name: (Plain(recipe.precision.stream), shapes[name]) for name, _ in inner.named_parameters()}
    frozen = FrozenBytes(Layout(tensors, recipe.shards))
    bias = None if inner.bias is None else FrozenTensor(frozen, "bias")
    unit = _unit(path_of(model, inner), frozen)
    return Head(FrozenTensor(frozen, "weight"), bias, dtype, factor, softcap), unit


def _rest(model: PreTrainedModel, recipe: Recipe) -> tuple[FrozenViews, Unit | None]:
    """The backbone's other parameters and buffers (final norm, learned positions): small, so every rank has them."""
    backbone = backbone_of(model)
    prefix = path_of(model, backbone)
    ours = {
        tensor
        for m in backbone.modules()
        if isinstance(m, Block | FrozenEmbedding)
        for tensor in (*m.parameters(), *m.buffers())
    }
    others = {name: p for name, p in backbone.named_parameters() if p not in ours}
    # Linears that project what a few families put in or take out beside the layers: stored as those inside.
    linears = {name: m for name, m in backbone.named_modules() if is_linear(m)}
    codecs = {f"{name}.weight": recipe.codec_of(f"{prefix}.{name}.weight".lstrip(".")) for name in linears}
    plain = Plain(recipe.precision.stream)
    tensors: dict[str, tuple[Codec, tuple[int, ...]]] = {
        name: (codecs.get(name, plain), tuple(p.shape)) for name, p in others.items()
    }
    buffers = _buffers(backbone, recipe)
    tensors |= {name: buffers[name] for name in buffers if backbone.get_buffer(name) not in ours}
    if not tensors:
        return FrozenViews([]), None
    frozen = FrozenBytes(Layout(tensors))
    for name, linear in linears.items():
        backbone.set_submodule(name, _frozen_linear(name, linear, frozen, recipe))
    unit = Unit("rest", frozen, {name: f"{prefix}.{name}".lstrip(".") for name in tensors}, home="device")
    return _take_views(backbone, frozen, set(tensors)), unit


def _buffers(root: nn.Module, recipe: Recipe) -> dict[str, tuple[Codec, tuple[int, ...]]]:
    """The persistent buffers below `root`, where they are read."""
    found = persistent_buffers(root) if recipe.buffers else {}
    return {name: (Plain(buffer.dtype), tuple(buffer.shape)) for name, buffer in found.items()}


def _take_views(root: nn.Module, frozen: FrozenBytes, names: set[str] | None = None) -> FrozenViews:
    """Views for the parameters of `root` that `frozen` holds (all but adapters and frozen linears, or just `names`)."""
    bindings = []
    for name in frozen.layout.entries if names is None else names:
        owner_path, _, leaf = name.rpartition(".")
        owner = root.get_submodule(owner_path)
        if not isinstance(owner, FrozenLinear):
            bindings.append((owner, leaf, FrozenTensor(frozen, name)))
    return FrozenViews(bindings)


def _unit(path: str, frozen: FrozenBytes) -> Unit:
    return Unit(path, frozen, {name: f"{path}.{name}" for name in frozen.layout.entries})
