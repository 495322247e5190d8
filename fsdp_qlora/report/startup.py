"""What a run is about to do, in a few lines before anything is loaded; what goes where is the plan's table."""

import torch
from transformers import PretrainedConfig

from fsdp_qlora.adapters.table import choose_adapter
from fsdp_qlora.config.options import Config, EvaluationOptions
from fsdp_qlora.data.batches import Batches, Rows
from fsdp_qlora.data.packing import Bins
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.attention import Attention
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.fuse import Fusion
from fsdp_qlora.units import GIB, as_gib, count_of

SHORT = 0.6  # of context_length, that rows fill in the mean


def adapter_count(model: CausalModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def describe(
    model: CausalModel,
    hf_config: PretrainedConfig,
    config: Config,
    attention: Attention,
    fusion: Fusion,
    world: World,
) -> list[str]:
    """Return the model's lines of the start-up table."""
    linears = model.linears()
    weights = sum(torch.Size(e.shape).numel() for u in model.units for e in u.frozen.layout.entries.values())
    codec = next(iter(linears.values())).weight
    stored = codec.home.layout.entries[codec.name].codec.name
    base = sum(u.frozen.layout.nbytes for u in model.units)
    adapted = sum(m.lora_A is not None for m in linears.values())
    kind = choose_adapter(config.model.train_type).label
    return [
        f"model     {config.model.model_name}: {hf_config.model_type}, {len(model.blocks)} layers, "
        f"{_si(weights)} parameters" + (", RANDOM WEIGHTS" if config.model.dummy_weights else ""),
        f"base      {_size(base)} frozen, linears {stored}",
        f"adapters  {kind} rank {config.adapter.lora_rank} on {adapted} of {len(linears)} linears: "
        f"{_si(adapter_count(model))} parameters; {config.training.optimizer}, "
        f"master copy and state sharded over {_ranks(world)}",
        f"compute   {config.model.precision}, {fusion}",
        *_recomputation(config, fusion, attention),
    ]


def describe_rows(config: Config, batches: Batches, total_steps: int, world: World) -> list[str]:
    """Return its lines on data and steps."""
    last = batches.items % batches.rows_per_step
    shorter = f"; an epoch's last of {last}" if last else ""
    packed = [] if batches.bins is None else [_bins_line(batches.bins)]
    asked = config.training.max_steps
    ends = f"num_epochs {config.training.num_epochs} ends the run before max_steps {asked}"
    return [
        f"data      {batches.rows.summary}",
        *packed,
        f"run       {count_of(total_steps, 'step')} of {count_of(batches.rows_per_step, 'bin' if packed else 'row')} "
        f"({batches.batch_size} x {batches.accumulation} x {_ranks(world)}{shorter}), "
        f"{_counted(batches.completed(total_steps), 'epoch')}, context {config.data.context_length}",
        *([f"          {ends}"] if asked > total_steps else []),
    ]


def describe_evaluation(options: EvaluationOptions, rows: Rows) -> list[str]:
    """Return its lines on rows that are evaluated on, and when."""
    when = {0: "after each epoch", -1: "at the end"}.get(
        options.eval_steps, f"every {count_of(options.eval_steps, 'step')} and at the end"
    )
    when = f"before the first step, {when}" if options.eval_on_start else when
    patience = options.early_stopping_patience
    stops = f"; stops after {count_of(patience, 'evaluation')} without improvement" if patience is not None else ""
    return [f"eval      {rows.summary}", f"          {when}{stops}"]


def _bins_line(bins: Bins) -> str:
    """Return how well the rows were packed."""
    alone = "" if len(bins) < len(bins.lengths) else ": no two rows fit into one"
    return (
        f"packing   {count_of(len(bins.lengths), 'row')} in {count_of(len(bins), 'bin')} of {bins.capacity} tokens, "
        f"{bins.fill:.1%} full{alone}"
    )


def are_short(lengths: RowLengths, context_length: int) -> bool:
    """Return whether packing the rows is worth a word."""
    return lengths.bins is None and lengths.mean < SHORT * context_length


def packing_hint(lengths: RowLengths, context_length: int, now: float | None, packed: float | None) -> str:
    """Return a line for rows that are short. now, packed: tokens per second that the plan expects of them as they are,
    and put together."""
    fill = lengths.mean / context_length
    brings = f": {packed:,.0f} tok/s expected instead of {now:,.0f}" if now and packed else ""
    return (
        f"          rows fill {fill:.0%} of context_length {context_length} in the mean; --packing true puts "
        f"{1 / fill:.1f} of them into one row of the batch{brings}"
    )


def _recomputation(config: Config, fusion: Fusion, attention: Attention) -> list[str]:
    memory = config.memory
    if fusion.blocks:
        idle = memory.use_gradient_checkpointing and memory.reentrant_checkpointing
        return ["          reentrant_checkpointing has no effect on fused blocks"] if idle else []
    kind = "no" if not memory.use_gradient_checkpointing else "non-reentrant"
    if memory.use_gradient_checkpointing and memory.reentrant_checkpointing:
        kind = "reentrant"
    return [f"          {kind} gradient checkpointing, {attention.name} attention ({attention.reason})"]


def _ranks(world: World) -> str:
    return count_of(world.size, "rank")


def _counted(number: float, what: str) -> str:
    """Return a number, which may be a part of one, with its word."""
    return f"{number:.4f}".rstrip("0").rstrip(".") + f" {what}{'s' * (number != 1)}"


def _size(nbytes: float) -> str:
    return as_gib(nbytes, 2) if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"


def _si(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
