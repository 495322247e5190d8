"""The run, stage by stage: what is read and checked, what is built, what is loaded where, then the training loop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fsdp_qlora.adapters.table import choose_adapter
from fsdp_qlora.config.files import save as save_config
from fsdp_qlora.config.options import Config, DataOptions, MemoryOptions
from fsdp_qlora.data.batches import Batches, Rows, load_rows, load_tokenizer
from fsdp_qlora.data.show_rows import lines_of
from fsdp_qlora.data.sources import forget_stdin
from fsdp_qlora.distributed.world import World, open_world
from fsdp_qlora.errors import OR_ELSEWHERE, UserError
from fsdp_qlora.exchange.choose import check_exchange, choose_exchange
from fsdp_qlora.export.peft import check_space
from fsdp_qlora.models.causal_lm import CausalModel, Recipe, assemble
from fsdp_qlora.models.fitting import fit, has_its_own_head, left_over
from fsdp_qlora.models.fuse import Fusion, fuse
from fsdp_qlora.models.precision import Precision, precision_of
from fsdp_qlora.models.skeleton import (
    Attention,
    build,
    choose_attention,
    max_positions,
    quantization_of,
    read_config,
    text_config,
)
from fsdp_qlora.optim.optimizers import check_optimizer
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.placement.base import Placement, check_bytes
from fsdp_qlora.placement.choose import choose_placement
from fsdp_qlora.placement.load import check_names, load
from fsdp_qlora.plan.planning import micro_batches, plan_run, write_plan
from fsdp_qlora.report.machine import Stages, machine_lines, rates_line
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.startup import adapter_count, describe, describe_rows
from fsdp_qlora.runtime.background import beside
from fsdp_qlora.runtime.determinism import check_deterministic, deterministic_algorithms
from fsdp_qlora.runtime.files import Claim, writing_to
from fsdp_qlora.runtime.gpu_memory import outside_bytes
from fsdp_qlora.runtime.host_memory import HostMemory, give_back_freed
from fsdp_qlora.training.loop import Loop
from fsdp_qlora.training.retry import Refit
from fsdp_qlora.training.step import Stepper
from fsdp_qlora.units import GIB
from fsdp_qlora.weights.choose import open_weights
from fsdp_qlora.weights.codecs import Codec, Plain, choose_codec, is_quantized
from fsdp_qlora.weights.hub import OnHub
from fsdp_qlora.weights.source import Weights


def run(config: Config, notes: Sequence[str] = ()) -> int:
    """Train as `config` says. Returns the exit code: 0, or a signal's (130, 143) where one ended it early, and saved.

    notes: lines that the user shall see along with what the run is about to do."""
    stages = Stages()
    stages.done("imports")
    with (
        open_world(config.launch, config.training.seed) as world,
        HostMemory() as host,
        Claim() as claim,
        deterministic_algorithms(config.training.deterministic),
    ):
        stages.done("ranks")
        world.together(lambda: check_deterministic(config.training, world.device))
        folder, only_plan = Path(config.output.output_dir), config.memory.plan_only
        if not only_plan:
            world.main_only(lambda: claim.take(folder, config.output.overwrite_output_dir))
        model_name, revision = config.model.model_name, config.model.revision
        hf_config = world.first_on_node(lambda: read_config(model_name, revision))
        precision, attention = world.together(lambda: choose_compute(config, hf_config, world))
        world.together(lambda: check_optimizer(config.training, world.device))
        world.together(lambda: check_exchange(config.memory, world))
        longest = config.data.context_length
        if not only_plan or config.data.show_rows:
            tokenizer, rows = read_rows(config, hf_config, world)
            longest = rows.widest
        stages.done("config and data")
        weights = world.together(lambda: open_weights(config.model, precision.stream))
        model, fusion, weights = build_model(micro_batches(config)[0], hf_config, weights, precision, attention, world)
        stages.done("model")
        planned = plan_run(model, config, fusion, longest, world)
        plan, config = planned.plan, planned.config
        stages.done("plan")
        described = describe(model, hf_config, config, attention, fusion, world)
        if not only_plan or config.data.show_rows:
            batches = make_batches(config, rows, world)
            steps = count_steps(config, batches)
            described += describe_rows(config, batches, steps, world)
        if config.data.show_rows:
            described += lines_of(rows, tokenizer, config.data.show_rows)
        if config.output.verbose:
            described = [*machine_lines(world), *described]
        rates = [rates_line(planned.record["rates"])] if config.output.verbose and planned.record["rates"] else []
        for line in [*notes, *described, *planned.lines, *rates]:
            world.say(line)
        if only_plan:
            return 0
        metrics = world.together(lambda: Metrics(config, world, steps))
        world.main_only(lambda: note_run(config, folder, adapter_count(model), planned.record))

        placement = world.together(lambda: choose_placement(plan, config.memory, world, planned.link_rate))
        refit = Refit(planned, model, placement, config.training.batch_size * longest, world, folder)
        adapters = load_model(config, model, weights, placement, world)
        give_back_freed()
        hold_to_card(config.memory.gpu_memory_gib, world)
        arena = refit.first_arena(adapters.exchange.widens)
        stages.done("loading")
        if config.output.verbose:
            world.say(stages.line())
        torch.manual_seed(config.training.seed + world.rank)  # only dropout draws from here on
        stepper = Stepper(model, adapters, config.training, steps, world, arena)
        return Loop(config, world, host, metrics, stepper, refit, batches, steps, tokenizer, folder).run()


def choose_compute(config: Config, hf_config: PretrainedConfig, world: World) -> tuple[Precision, Attention]:
    """What this rank's device computes in and with; also limits how much of its memory may be taken."""
    cap_gpu_memory(config.memory.gpu_memory_gib, world)
    precision = precision_of(config.model.precision, world.device)
    return precision, choose_attention(config.model.attention, hf_config, precision, world.device)


def cap_gpu_memory(gib: float | None, world: World) -> None:
    """Let PyTorch allocate no more than `gib` on this rank's GPU."""
    if gib is None:
        return
    if world.device.type != "cuda":
        raise UserError(f"gpu_memory_gib: {gib:g} has no effect without a GPU; leave it away, {OR_ELSEWHERE}")
    total = torch.cuda.get_device_properties(world.device).total_memory / GIB
    if gib > total:
        raise UserError(
            f"gpu_memory_gib: {gib:g} is more than the card has ({total:.1f} GiB); leave it away or lower it"
        )
    torch.cuda.set_per_process_memory_fraction(gib / total, world.device)


def hold_to_card(gib: float | None, world: World) -> None:
    """Let PyTorch allocate no more than makes `gib` with what this process holds on its GPU beside PyTorch."""
    if gib is not None:
        total = torch.cuda.get_device_properties(world.device).total_memory
        allowed = gib * GIB - outside_bytes(world.device)
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, allowed / total)), world.device)


def read_rows(config: Config, hf_config: PretrainedConfig, world: World) -> tuple[PreTrainedTokenizerBase | None, Rows]:
    """The tokenizer and the tokenized rows, which a node's first rank makes and its others find in the cache."""
    model_name, revision = config.model.model_name, config.model.revision
    try:
        return world.first_on_node(lambda: read_data(config.data, model_name, revision, hf_config, world.is_main))
    finally:
        if world.local_rank == 0:
            forget_stdin()


def read_data(
    options: DataOptions, model_name: str, revision: str | None, hf_config: PretrainedConfig, progress: bool = False
) -> tuple[PreTrainedTokenizerBase | None, Rows]:
    """The tokenizer and the tokenized rows. The dummy dataset needs none, and does without where there is none."""
    try:
        tokenizer = load_tokenizer(model_name, revision)
    except UserError:
        if options.dataset != "dummy":
            raise
        tokenizer = None
    return tokenizer, load_rows(
        options, tokenizer, max_positions(hf_config), text_config(hf_config).vocab_size, progress
    )


def note_run(config: Config, folder: Path, adapter_parameters: int, plan: dict[str, Any]) -> None:
    """Write the run's options and plan beside what it will leave, once it is sure that there is room for that."""
    if config.output.save_model:
        check_space(folder, adapter_parameters)
    with writing_to(folder, "output_dir"):
        save_config(config, folder / "config.yaml")
        write_plan(folder, plan)


def make_batches(config: Config, rows: Rows, world: World) -> Batches:
    training = config.training
    return Batches(
        rows, training.batch_size, training.gradient_accumulation_steps, world.size, world.rank, training.seed
    )


def count_steps(config: Config, batches: Batches) -> int:
    """Optimizer steps of the run."""
    steps = batches.steps_per_epoch * config.training.num_epochs
    return min(steps, config.training.max_steps) if config.training.max_steps > 0 else steps


def build_model(
    config: Config,
    hf_config: PretrainedConfig,
    weights: Weights,
    precision: Precision,
    attention: Attention,
    world: World,
) -> tuple[CausalModel, Fusion, Weights]:
    """The model without its weights, what came of fusing its blocks, and the weights by its own names. A collective.

    Raises UserError on every rank alike."""
    skeleton = world.together(lambda: build(hf_config, precision, attention.name))
    fitted = world.first_on_node(lambda: fit(skeleton, weights))
    own_head = world.agree(lambda: has_its_own_head(skeleton, fitted))
    recipe = world.together(lambda: make_recipe(config, hf_config, fitted, precision, own_head, world))
    for line in left_over(skeleton, fitted, own_head):
        world.say(line)
    model = world.together(lambda: assemble(skeleton, recipe, config.adapter))
    for module in model.backbone.modules():  # rotary tables, which not every family moves to where their input is
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(world.device))
    if not isinstance(weights, OnHub):  # a download waits until all else is known to be right
        world.together(lambda: check_names(model, fitted))
    return model, world.together(lambda: fuse(model, config, world.device)), fitted


def load_model(
    config: Config, model: CausalModel, weights: Weights, placement: Placement, world: World
) -> ShardedAdapters:
    """Read the frozen weights to where `placement` wants them; the adapters that train over them. A collective.

    Raises UserError on every rank alike, before anything is read, where the checkpoint is not this model's."""
    world.first_on_node(lambda: check_names(model, weights))
    adapters = ShardedAdapters(model, world, config, draw=False)
    placement.prepare(model)  # page-locks host memory from here on
    drawn = beside(adapters.draw, world.device)
    adapters.exchange = choose_exchange(adapters.largest, config.memory, world)
    load(model, weights, placement, world)
    check_bytes(model, placement)
    drawn.result()
    return adapters


def make_recipe(
    config: Config,
    hf_config: PretrainedConfig,
    weights: Weights,
    precision: Precision,
    own_head: bool,
    world: World,
) -> Recipe:
    remat = rematerialisation(config.memory)
    return Recipe(
        precision,
        storage(config, hf_config, weights, precision),
        remat,
        shards=world.size,  # whatever the placement: the padding is a few hundred bytes
        host_embedding=world.device.type == "cuda",
        own_head=own_head,
        is_quantized=lambda name: is_quantized(name, weights.names()),
        buffers=weights.names() is not None,
        adapter=choose_adapter(config.model.train_type),
    )


def storage(
    config: Config, hf_config: PretrainedConfig, weights: Weights, precision: Precision
) -> Callable[[str], Codec]:
    """Checkpoint name of a linear's weight -> how it is kept: a quantized checkpoint may have left some as they are."""
    codec, prequantized = choose_codec(config.model, quantization_of(hf_config), precision.compute)
    plain = Plain(precision.compute)
    return lambda name: codec if not prequantized or is_quantized(name, weights.names()) else plain


def rematerialisation(options: MemoryOptions) -> str | None:
    """The kind of checkpointing that blocks are built with."""
    if not options.use_gradient_checkpointing:
        return None
    return "reentrant" if options.reentrant_checkpointing else "non_reentrant"
