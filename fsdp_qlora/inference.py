"""A model put together to answer and to be measured: built, placed without training in mind, its adapter on or off.

The lighter sibling of `session.py`: no optimizer, no arena, no plan of a step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.options import Config, ModelOptions
from fsdp_qlora.data.batches import load_tokenizer
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.adapter_folder import SavedAdapter, base_options, read_adapter
from fsdp_qlora.generation.adapter_values import make_adapters, set_adapters
from fsdp_qlora.generation.decoder import FusedDecoder, GenericDecoder, make_decoder
from fsdp_qlora.generation.placing import Fit, Workload, copies_bytes, fit
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.fuse import Fusion
from fsdp_qlora.placement.base import check_bytes
from fsdp_qlora.placement.cache_use import open_cache
from fsdp_qlora.placement.choose import choose_placement
from fsdp_qlora.placement.load import check_names, load
from fsdp_qlora.plan.budget import device_bytes
from fsdp_qlora.runtime.gpu_memory import hold_to_card
from fsdp_qlora.runtime.host_memory import available_host_bytes, give_back_freed
from fsdp_qlora.session import Compute, build_model
from fsdp_qlora.weights.choose import open_weights

HOST_SHARE = 0.5  # of host memory, that decoded copies may take where there is no GPU: decoding is most of a step there


@dataclass(frozen=True)
class Base:
    """What a model is made from: options as train.py has them, and the adapter, None: the base alone."""

    config: Config
    adapter: SavedAdapter | None

    @property
    def tokenizer_folder(self) -> str:
        """Return where the tokenizer is: with the adapter, as its training had it, else with the base."""
        folder = self.adapter.folder if self.adapter is not None else None
        saved = folder is not None and (folder / "tokenizer_config.json").is_file()
        return str(folder) if saved else self.config.model.model_name


def read_base(adapter: str | None, model: ModelOptions, given: Mapping[str, Any], config: Config) -> Base:
    """Return what to make. Reads the adapter's headers and nothing of the base.

    model: the options as they are where no adapter says more. given: those that the user named, as `base_options`
    takes them; a precision among them is for computing now. config: the rest of the options."""
    if adapter is None:
        targets = replace(config.adapter, lora_target_modules=[])
        return Base(replace(config, model=model, adapter=targets), None)
    saved = read_adapter(Path(adapter))
    known = saved.run is not None
    named = {name: value for name, value in given.items() if name != "precision" or not known}
    options = base_options(saved, named, stored=True, instead="")
    options = replace(
        options, attention=model.attention, fused=model.fused, loading_workers=model.loading_workers,
        base_cache=model.base_cache,
        precision=given.get("precision") or options.precision,
    )  # fmt: skip
    adapters = replace(saved.options, lora_target_modules=list(saved.linears))
    return Base(replace(config, model=options, adapter=adapters), saved)


@dataclass
class Built:
    """A model without its weights."""

    base: Base
    world: World
    compute: Compute
    model: CausalModel
    fusion: Fusion
    load: Callable[[Fit], "Loaded"]


@dataclass
class Loaded:
    """A model with its weights, its adapter set."""

    base: Base
    world: World
    model: CausalModel
    fit: Fit

    def set_adapter(self, is_on: bool) -> None:
        """Let the model answer with its adapter, or as its base alone."""
        saved = self.base.adapter
        set_adapters(self.model, saved.values if is_on and saved is not None else None)

    def decoder(self, rows: int, capacity: int) -> FusedDecoder | GenericDecoder:
        """Return a decoder for so many rows; weights are decoded for good where that pays and memory is left."""
        world, memory = self.world, self.base.config.memory
        decoder = make_decoder(self.model, rows, capacity, world.device)
        if not isinstance(decoder, FusedDecoder):
            return decoder
        if world.device.type != "cuda":
            decoder.keep_copies(int(HOST_SHARE * available_host_bytes() / world.local_size))
        else:
            decoder.keep_copies(copies_bytes(device_bytes(memory, world), self.fit.plan))
        return decoder


def build(base: Base, world: World, compute: Compute) -> Built:
    """Return the model without its weights. A collective. Raises UserError on every rank alike."""
    config, saved = base.config, base.adapter
    weights = world.together(lambda: open_weights(config.model, compute.precision.stream))
    try:
        model, fusion, weights = build_model(config, compute, weights, world)
    except UserError as error:
        if saved is None or not str(error).startswith("lora_target_modules"):
            raise
        raise UserError(
            f"adapter: {saved.folder} has linears that {config.model.model_name} does not have ({error})"
        ).on_every_rank(world.rank) from error
    if saved is not None:
        world.together(lambda: _check_shapes(model, saved))

    def load_it(found: Fit) -> Loaded:
        world.first_on_node(lambda: check_names(model, weights))
        make_adapters(model, world.device)
        placement = world.together(lambda: choose_placement(found.plan, config.memory, world, trains=False))
        placement.prepare(model)
        load(model, weights, placement, world, open_cache(config.model, model, weights, world))
        check_bytes(model, placement)
        give_back_freed()
        hold_to_card(config.memory.gpu_memory_gib, world.device)
        model.eval()
        loaded = Loaded(base, world, model, found)
        world.together(lambda: loaded.set_adapter(True))
        return loaded

    return Built(base, world, compute, model, fusion, load_it)


def _check_shapes(model: CausalModel, saved: SavedAdapter) -> None:
    """Raise UserError where the adapter's matrices are not of this model's linears."""
    for path, linear in model.linears().items():
        wanted = {name: tuple(p.shape) for name, p in linear.adapter_parameters().items()}
        if wanted and wanted != saved.shapes_of(path):
            raise UserError(
                f"adapter: {saved.folder} has {path} of shapes {saved.shapes_of(path)}, the model wants {wanted}: it "
                "belongs to another base"
            )


def tokenizer_of(base: Base) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the adapter's training, else the base's."""
    named = base.tokenizer_folder
    return load_tokenizer(named, base.config.model.revision if named == base.config.model.model_name else None)


def fit_rows(built: Built, work: Workload) -> Fit:
    """Return where the base goes and how many rows are answered at a time. A collective. Raises UserError."""
    return fit(built.model, built.base.config, built.world, work)
