"""Assembly: a skeleton's embedding, decoder layers and head replaced by modules that read frozen bytes.

Nothing has values yet: the layouts of the bytes and the adapters' shapes are what is made here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.base import AdapterKind
from fsdp_qlora.adapters.lora import LoRA, lora_scale
from fsdp_qlora.adapters.targets import choose_targets
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.dora import exact_dtype
from fsdp_qlora.models.causal_lm import CausalModel, CurrentSegments, FrozenEmbedding, Head, RowNorms, Unit
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.fused.fuse import Fusion, serve_fused
from fsdp_qlora.models.generic_block import Block, DeclaredAdapter, FrozenLayer, FrozenLinear, FrozenViews
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

# (layers, backbone, precision, whether the first block copies its input) -> the blocks' passes, none where one cannot
# be fused, and what came of it: `models.fused.fuse.fuse` for some options and a device
Fuse = Callable[[Sequence[FrozenLayer], PreTrainedModel, Precision, bool], tuple[list[FusedBlock], Fusion]]
ROW_NORMS = "row_norms"  # after a linear's name: the entry of its weight's norms by rows


@dataclass(frozen=True)
class Recipe:
    """How a model's pieces are made.

    codec_of: checkpoint name of a decoder linear's weight -> how it is stored. remat: see `Block`. shards: number of
    ranks among which each unit's bytes must divide evenly. host_embedding: whether an embedding that is not also the
    head stays in host memory. own_head: whether the head has its own weights whatever the config says.
    is_quantized: whether the checkpoint holds the weight of that name quantized. buffers: whether persistent buffers
    are in it, or keep their first values. adapter: what trains. check_linears: raises UserError where the options do
    not fit the linears, given (codec, shape) of each.
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
    check_linears: Callable[[Sequence[tuple[Codec, tuple[int, ...]]]], None] = lambda linears: None


def assemble(
    model: PreTrainedModel, recipe: Recipe, adapter: AdapterOptions, fuse: Fuse | None = None
) -> tuple[CausalModel, Fusion]:
    """Replace a skeleton's embedding, decoder layers and head by ours. Return the model, and what came of fusing it.

    Nothing has values yet. fuse: makes the passes of fused blocks; None: all blocks are generic.
    Raises UserError for an architecture whose layers are not plain linears, for target modules that match nothing, and
    as `fuse` does.
    """
    path, layers = decoder_layers(model)
    by_path = {f"{path}.{i}": layer for i, layer in enumerate(layers)}
    names = [f"{path}.{name}" for path, layer in by_path.items() for name, m in layer.named_modules() if is_linear(m)]
    targets = set(choose_targets(adapter.lora_target_modules, names))
    linear_paths = [name for name, m in model.named_modules() if is_linear(m)]
    tied = f"{path_of(model, head_of(model))}.weight" in model.all_tied_weights_keys and not recipe.own_head
    on_host = recipe.host_embedding and type(model.get_input_embeddings()) is nn.Embedding and not tied
    backbone, current = backbone_of(model), CurrentSegments()

    inner = {
        f"{path_of(model, backbone)}.{name}".lstrip("."): m for name, m in backbone.named_modules() if is_linear(m)
    }
    recipe.check_linears([(_codec_of(name, m, recipe), tuple(m.weight.shape)) for name, m in inner.items()])

    # Layers over frozen bytes, adapters declared: what the spec of a fused block is read off.
    frozen = [_freeze(path, layer, recipe, adapter, targets) for path, layer in by_path.items()]
    passes, fusion = list[FusedBlock](), Fusion(0, 0, (), "as asked")
    if fuse is not None:
        passes, fusion = fuse([of for of, _ in frozen], backbone, recipe.precision, not on_host)

    # Modules that are complete when they are made. Where the first block trains, its backward hangs on its adapters,
    # and it need not make a gradient of its input.
    asks = not passes or all(linear.lora_A is None for linear in passes[0].spec.linears)
    embedding, embedding_unit = _embedding(model, recipe, on_host, asks)
    head, head_unit = _head(model, recipe, embedding, tied)
    blocks = {path: Block(of, recipe.remat, fused) for path, (of, _), fused in zip_longest(by_path, frozen, passes)}

    # Their places in the skeleton. `_rest` names all other tensors by theirs: rotary tables and norm change after it.
    model.set_input_embeddings(embedding)
    for i, block in enumerate(blocks.values()):
        layers[i] = block
    rest, rest_unit = _rest(model, recipe)
    final_norm = serve_fused(backbone, frozen[0][0].layer, passes[0].spec, current) if passes else nn.Identity()
    units = [u for u in (embedding_unit, *(unit for _, unit in frozen), head_unit, rest_unit) if u is not None]
    ours = CausalModel(
        backbone, embedding, blocks, final_norm, head, units, rest, recipe.precision, current, linear_paths
    )
    return ours, fusion


def _freeze(
    path: str, layer: nn.Module, recipe: Recipe, adapter: AdapterOptions, targets: set[str]
) -> tuple[FrozenLayer, Unit]:
    """Let a layer read frozen bytes."""
    linears = {name: m for name, m in layer.named_modules() if is_linear(m)}
    tensors: dict[str, tuple[Codec, tuple[int, ...]]] = {}
    for name, parameter in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in linears and leaf == "weight":
            tensors[name] = (_codec_of(f"{path}.{owner}", linears[owner], recipe), tuple(parameter.shape))
        elif parameter.ndim < 2 or "Norm" in type(layer.get_submodule(owner)).__name__:  # Cohere's has a row a head
            tensors[name] = (Plain(recipe.precision.stream), tuple(parameter.shape))
        else:
            raise UserError(
                f"model_name: {path}.{name} {list(parameter.shape)} is a matrix outside nn.Linear "
                f"({type(layer.get_submodule(owner)).__name__}); only decoder layers of plain linears are trained "
                "(no mixture of experts, no convolutions)"
            )
    tensors |= _buffers(layer, recipe)
    adapted = [name for name in linears if f"{path}.{name}" in targets]
    norms_of = {name: f"{name}.{ROW_NORMS}" for name in adapted} if recipe.adapter.reads_norms else {}
    exact = Plain(exact_dtype(recipe.precision.compute))
    stored = tensors | {entry: (exact, (linears[name].weight.shape[0],)) for name, entry in norms_of.items()}
    frozen = FrozenBytes(Layout(stored, recipe.shards))
    for name, linear in linears.items():
        declared = None
        if name in adapted:
            shapes = recipe.adapter.parameters(linear.weight.shape[0], linear.weight.shape[1], adapter)
            norms = FrozenTensor(frozen, norms_of[name]) if name in norms_of else None
            declared = DeclaredAdapter(shapes, lora_scale(adapter), adapter.lora_dropout, norms)
        layer.set_submodule(name, _frozen_linear(name, linear, frozen, recipe, declared))
    unit = _unit(path, frozen, tensors)
    stored_norms = {entry: RowNorms(f"{name}.weight", recipe.precision.compute) for name, entry in norms_of.items()}
    return FrozenLayer(layer, frozen, _take_views(layer, frozen)), replace(unit, norms=stored_norms)


def _codec_of(path: str, linear: nn.Module, recipe: Recipe) -> Codec:
    """Return how the weight of a linear at that path of the model is stored."""
    quantizes = type(linear) is nn.Linear or recipe.is_quantized(f"{path}.weight")
    return recipe.codec_of(f"{path}.weight") if quantizes else Plain(recipe.precision.compute)


def _frozen_linear(
    name: str, linear: nn.Module, frozen: FrozenBytes, recipe: Recipe, adapter: DeclaredAdapter | None = None
) -> FrozenLinear:
    bias = None if linear.bias is None else FrozenTensor(frozen, f"{name}.bias")
    return FrozenLinear(FrozenTensor(frozen, f"{name}.weight"), bias, recipe.precision.compute, adapter)


def _embedding(
    model: PreTrainedModel, recipe: Recipe, on_host: bool, asks_for_gradient: bool
) -> tuple[FrozenEmbedding, Unit]:
    inner = model.get_input_embeddings()
    path = path_of(model, inner)
    frozen = FrozenBytes(Layout({"weight": (Plain(recipe.precision.stream), tuple(inner.weight.shape))}, recipe.shards))
    unit = replace(_unit(path, frozen), home="host" if on_host else "shared")
    return FrozenEmbedding(inner, frozen, _take_views(inner, frozen), on_host, asks_for_gradient), unit


def _head(model: PreTrainedModel, recipe: Recipe, embedding: FrozenEmbedding, tied: bool) -> tuple[Head, Unit | None]:
    """The head over its own bytes, or over the embedding's where the two are tied (no unit of its own then)."""
    inner = head_of(model)
    factor, softcap = logit_shape(model)
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


def _unit(path: str, frozen: FrozenBytes, names: Iterable[str] | None = None) -> Unit:
    names = frozen.layout.entries if names is None else names
    return Unit(path, frozen, {name: f"{path}.{name}" for name in names})
