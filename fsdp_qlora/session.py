"""A model put together for a run: its compute chosen, built, planned, then loaded where the plan places it.

The stages are apart: a plan ends before the weights are read, and a run sets what blocks keep before they are loaded.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PretrainedConfig

from fsdp_qlora.adapters.table import choose_adapter
from fsdp_qlora.config.options import Config, MemoryOptions
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.distributed.alike import check_alike
from fsdp_qlora.distributed.world import World, idle_gpus
from fsdp_qlora.exchange.choose import check_exchange, choose_exchange
from fsdp_qlora.kernels.quick_launch import slower_launches
from fsdp_qlora.models.assemble import Recipe, assemble
from fsdp_qlora.models.attention import Attention, choose_attention
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fitting import fit, has_its_own_head, left_over
from fsdp_qlora.models.fused.fuse import Fusion, fuse
from fsdp_qlora.models.precision import Precision, precision_of
from fsdp_qlora.models.skeleton import build, quantization_of, read_config
from fsdp_qlora.optim.optimizers import check_optimizer
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.placement.base import Placement, check_bytes
from fsdp_qlora.placement.cache_use import open_cache
from fsdp_qlora.placement.choose import choose_placement
from fsdp_qlora.placement.load import check_names, load
from fsdp_qlora.plan.planning import Planned, micro_batches, plan_run
from fsdp_qlora.runtime.background import beside
from fsdp_qlora.runtime.gpu_memory import cap_gpu_memory
from fsdp_qlora.weights.base_cache.disk import NOTHING_OWED, Owed
from fsdp_qlora.weights.choose import Told, check_asked_groups, codec_chooser, open_weights, told_forms
from fsdp_qlora.weights.codecs import is_quantized
from fsdp_qlora.weights.hub import OnHub
from fsdp_qlora.weights.source import Weights


@dataclass(frozen=True)
class Compute:
    """A model's config.json, and what this rank's device computes the model in and with."""

    hf_config: PretrainedConfig
    precision: Precision
    attention: Attention  # of blocks that are not fused


@dataclass(frozen=True)
class Session:
    """A model that is built and planned. Its weights are not read yet: a run can still end before a download."""

    config: Config  # as it was given
    world: World
    compute: Compute
    model: CausalModel
    fusion: Fusion
    weights: Weights  # under the model's own names
    planned: Planned

    def place(self) -> Placement:
        """Return the plan's placement, for `load`. A collective."""
        plan, memory = self.planned.plan, self.config.memory
        return self.world.together(lambda: choose_placement(plan, memory, self.world, self.planned.link_rate))

    def load(self, placement: Placement, owed: Owed = NOTHING_OWED) -> ShardedAdapters:
        """Read the frozen weights to where `placement` wants them; return the adapters that train. A collective.

        owed: disk space that the run takes later. Raises UserError on every rank alike, before anything is read, if the
        checkpoint is not this model's."""
        model, world = self.model, self.world
        world.first_on_node(lambda: check_names(model, self.weights))
        adapters = ShardedAdapters(
            model, world, self.config, accumulates=self.planned.plan.accumulation > 1, draw=False
        )
        placement.prepare(model)  # page-locks host memory from here on
        drawn = None if adapters.reads_norms else beside(adapters.draw, world.device)
        adapters.exchange = choose_exchange(adapters.largest, self.config.memory, world)
        cache = open_cache(self.config.model, model, self.weights, world, owed)
        norms = load(model, self.weights, placement, world, cache)
        check_bytes(model, placement)
        if drawn is None:
            adapters.draw(norms)
        else:
            drawn.result()
        return adapters


def choose_compute(config: Config, world: World) -> Compute:
    """Read the model's config and choose what computes it, with the options checked against this rank's device.

    A collective. Limits how much of the device's memory may be allocated from now on."""
    options = config.model
    hf_config = world.first_on_node(lambda: read_config(options.model_name, options.revision))
    check_alike({"model_name": _checksum(hf_config)}, world, "give every node the same config.json")

    def choose() -> Compute:
        cap_gpu_memory(config.memory.gpu_memory_gib, world.device)
        precision = precision_of(options.precision, world.device)
        return Compute(hf_config, precision, choose_attention(options.attention, hf_config, precision, world.device))

    compute = world.together(choose)
    if idle := idle_gpus(world):
        world.say(idle)
    if world.device.type == "cuda" and (slower := slower_launches()):
        world.say(slower)
    world.together(lambda: check_optimizer(config.training, world.device))
    world.together(lambda: check_exchange(config.memory, world))
    return compute


def _checksum(hf_config: PretrainedConfig) -> str:
    text = json.dumps(hf_config.to_diff_dict() | {"_name_or_path": ""}, sort_keys=True, default=str)
    return f"a config.json with the checksum {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prepare(
    config: Config,
    world: World,
    compute: Compute,
    lengths: RowLengths | None,
    done: Callable[[str], None] = lambda stage: None,
    beside: Callable[[CausalModel], int] = lambda model: 0,
) -> Session:
    """Return the model of `config`, built and planned. A collective. Raises UserError on every rank alike.

    lengths: of the rows; None: all fill the context. done: told of each stage that has ended. beside: bytes of a device
    that something else than training takes between two steps."""
    weights = world.together(lambda: open_weights(config.model, compute.precision.stream))
    model, fusion, weights = build_model(micro_batches(config)[0], compute, weights, world)
    done("model")
    planned = plan_run(model, config, fusion, lengths, world, beside(model))
    done("plan")
    return Session(config, world, compute, model, fusion, weights, planned)


def build_model(
    config: Config,
    compute: Compute,
    weights: Weights,
    world: World,
) -> tuple[CausalModel, Fusion, Weights]:
    """Return the model without its weights, the result of fusing its blocks, and the weights under its own names.

    A collective. Raises UserError on every rank alike."""
    skeleton = world.together(lambda: build(compute.hf_config, compute.precision, compute.attention.name))
    fitted = world.first_on_node(lambda: fit(skeleton, weights))
    own_head = world.agree(lambda: has_its_own_head(skeleton, fitted))
    # Read by one rank: a header of many tensors takes long to parse.
    told = world.from_main(lambda: told_forms(quantization_of(compute.hf_config), fitted, compute.precision.compute))
    recipe = world.together(
        lambda: make_recipe(config, compute.hf_config, fitted, compute.precision, own_head, world, told)
    )
    for line in left_over(skeleton, fitted, own_head):
        world.say(line)
    passes = partial(fuse, config, world.device)
    model, fusion = world.together(lambda: assemble(skeleton, recipe, config.adapter, passes))
    for module in model.backbone.modules():  # rotary tables, which not every family moves to its input's device
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(world.device))
    if not isinstance(weights, OnHub):  # a download waits until all else is known to be right
        world.together(lambda: check_names(model, fitted))
    return model, fusion, fitted


def make_recipe(
    config: Config,
    hf_config: PretrainedConfig,
    weights: Weights,
    precision: Precision,
    own_head: bool,
    world: World,
    told: Told,
) -> Recipe:
    """Return how the options and the checkpoint say that the model's pieces are made. told: its `told_forms`."""
    quantization = quantization_of(hf_config)
    published = quantization is not None or bool(told)
    return Recipe(
        precision,
        codec_chooser(config.model, quantization, weights, precision.compute, told),
        checkpointing_kind(config.memory),
        shards=world.size,  # also if the placement shards nothing: the padding is a few hundred bytes
        host_embedding=world.device.type == "cuda",
        own_head=own_head,
        is_quantized=lambda name: is_quantized(name, weights.names()),
        buffers=weights.names() is not None,
        adapter=choose_adapter(config.model.train_type),
        check_linears=(lambda linears: None) if published else partial(check_asked_groups, config.model),
    )


def checkpointing_kind(options: MemoryOptions) -> str | None:
    """Return the kind of activation checkpointing that blocks are built with."""
    if not options.use_gradient_checkpointing:
        return None
    return "reentrant" if options.reentrant_checkpointing else "non_reentrant"
