"""A training run, stage by stage: checked, read, built, planned, loaded, trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fsdp_qlora.config.files import save as save_config
from fsdp_qlora.config.options import Config
from fsdp_qlora.data.batches import Batches, Rows, load_rows, load_tokenizer
from fsdp_qlora.data.held_out import rows_to_evaluate
from fsdp_qlora.data.packing import Bins
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.data.show_rows import lines_of
from fsdp_qlora.data.sources import forget_stdin
from fsdp_qlora.distributed.world import World, open_world
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.peft import check_space
from fsdp_qlora.models.skeleton import max_positions, text_config
from fsdp_qlora.plan.planning import packed_speed, with_micro_batch, write_plan
from fsdp_qlora.report.loggers import check_installed
from fsdp_qlora.report.machine import Stages, machine_lines, rates_line
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.startup import (
    adapter_count,
    are_short,
    describe,
    describe_evaluation,
    describe_rows,
    packing_hint,
)
from fsdp_qlora.runtime.determinism import check_deterministic, deterministic_algorithms
from fsdp_qlora.runtime.files import Claim, writing_to
from fsdp_qlora.runtime.gpu_memory import hold_to_card
from fsdp_qlora.runtime.host_memory import HostMemory, give_back_freed
from fsdp_qlora.session import Session, choose_compute, prepare
from fsdp_qlora.training.agreement import base_of, check_base, check_place, place_in
from fsdp_qlora.training.checkpoint import Checkpoints, checkpoint_bytes, most_at_once
from fsdp_qlora.training.evaluate import Evaluator
from fsdp_qlora.training.evaluations import Evaluations, check_evaluations
from fsdp_qlora.training.loop import Loop
from fsdp_qlora.training.resume import find_checkpoint, forget_others, notes_of
from fsdp_qlora.training.retry import Refit
from fsdp_qlora.training.step import Stepper


@dataclass(frozen=True)
class Data:
    """The tokenized rows of a run and their tokenizer."""

    tokenizer: PreTrainedTokenizerBase | None  # None: the dummy dataset of a model without one
    rows: Rows  # to train on
    held_out: Rows | None  # to evaluate on


def run(config: Config, notes: Sequence[str] = ()) -> int:
    """Train as `config` says. Returns the exit code: 0, or a signal's (130, 143) if one ended it early, and saved.

    notes: lines for the user along with what the run is about to do."""
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
            world.together(lambda: check_installed(config))
            goes_on = config.output.resume is not None
            world.main_only(lambda: claim.take(folder, goes_on or config.output.overwrite_output_dir))
        checkpoint = None if only_plan else find_checkpoint(config, world)
        compute = choose_compute(config, world)
        data = None if only_plan and not config.data.show_rows else read_data(config, compute.hf_config, world)
        lengths = None if data is None else row_lengths(config, data.rows)
        stages.done("config and data")
        session = prepare(config, world, compute, lengths_to_plan(data, lengths), stages.done)
        planned, plan = session.planned, session.planned.plan
        batches = None if data is None else make_batches(session, data.rows, lengths)
        noted = with_micro_batch(config, plan.micro_batch, plan.accumulation)  # what repeats this run
        resumed = []
        if checkpoint is not None:
            assert batches is not None
            world.main_only(partial(check_place, checkpoint, config, batches, count_steps(config, batches)))
            resumed = notes_of(checkpoint, noted, world)
        for line in [*notes, *start_lines(session, data, batches, lengths), *resumed]:
            world.say(line)
        if only_plan:
            return 0
        assert data is not None
        assert batches is not None
        steps = count_steps(config, batches)
        world.together(lambda: check_evaluations(config.evaluation, steps, batches.steps_per_epoch))
        earlier = None if checkpoint is None else (checkpoint.run_folder(folder), checkpoint.step)
        metrics = world.together(lambda: Metrics(noted, world, steps, earlier))
        left = steps - (0 if checkpoint is None else checkpoint.step)
        world.main_only(lambda: check_room(noted, folder, adapter_count(session.model), left))
        if checkpoint is None:
            world.main_only(lambda: note_run(noted, folder, planned.record))

        layout = planned.layout if data.held_out is not None else None
        forward = None if layout is None else layout.of_forward()  # before a placement hooks into the model
        placement = session.place()
        refit = Refit(planned, session.model, placement, planned.facts.tokens, world, folder)
        adapters = session.load(placement)
        give_back_freed()
        hold_to_card(config.memory.gpu_memory_gib, world.device)
        arena = refit.first_arena(adapters.exchange.widens)
        stages.done("loading")
        if config.output.verbose:
            world.say(stages.line())
        torch.manual_seed(config.training.seed + world.rank)  # only dropout draws from here on
        stepper = Stepper(session.model, adapters, config.training, steps, world, arena)
        base = base_of(session.model, world.device)
        evaluations = None
        if data.held_out is not None:
            borrow = partial(stepper.lend, forward)
            evaluator = Evaluator(session.model, data.held_out, planned.facts.tokens, world, borrow)
            evaluations = Evaluations(config.evaluation, evaluator, steps, batches.steps_per_epoch)
        parts = {} if evaluations is None else {"evaluations": evaluations}
        checkpoints = Checkpoints(noted, world, stepper, partial(place_in, batches), base, parts)
        if checkpoint is not None:
            world.main_only(partial(check_base, checkpoint, config, base, checkpoints.adapters))
            checkpoints.load(checkpoint)
            if evaluations is not None and not checkpoint.is_in(folder):
                evaluations.kept = None  # in the other folder
            world.main_only(metrics.take_over)  # from here on files of the run that goes on are changed
            world.main_only(lambda: note_run(noted, folder, planned.record))
        world.main_only(partial(forget_others, folder, checkpoint, world))
        return Loop(
            config, world, host, metrics, stepper, refit, batches, steps, data.tokenizer, folder, checkpoints,
            evaluations,
        ).run()  # fmt: skip


def read_data(config: Config, hf_config: PretrainedConfig, world: World) -> Data:
    """Return tokenizer and tokenized rows, which a node's first rank makes and its others find in the cache.

    A collective."""
    try:
        return world.first_on_node(lambda: load_data(config, hf_config, progress=world.is_main))
    finally:
        if world.local_rank == 0:
            forget_stdin()


def load_data(config: Config, hf_config: PretrainedConfig, progress: bool) -> Data:
    """Return tokenizer and tokenized rows. The dummy dataset needs no tokenizer, and a model may be without one."""
    try:
        tokenizer = load_tokenizer(config.model.model_name, config.model.revision)
    except UserError:
        if config.data.dataset != "dummy":  # nor is its eval_dataset then
            raise
        tokenizer = None
    vocabulary = text_config(hf_config).vocab_size
    rows = load_rows(config.data, tokenizer, max_positions(hf_config), vocabulary, progress)
    return Data(tokenizer, *rows_to_evaluate(config, rows, tokenizer, vocabulary, progress))


def start_lines(session: Session, data: Data | None, batches: Batches | None, lengths: RowLengths | None) -> list[str]:
    """Return what the run is about to do, for the user. A collective."""
    config, world, planned = session.config, session.world, session.planned
    compute, verbose = session.compute, config.output.verbose
    lines = describe(session.model, compute.hf_config, config, compute.attention, session.fusion, world)
    if batches is not None:
        lines += describe_rows(config, batches, count_steps(config, batches), world)
    if data is not None and data.held_out is not None:
        lines += describe_evaluation(config.evaluation, data.held_out)
    context = config.data.context_length
    if data is None and config.data.dataset != "dummy":
        lines.append(f"data      not read, rows taken to fill {context} tokens; --show_rows 1 reads and counts them")
    if lengths is not None and session.fusion.blocks and are_short(lengths, context):
        speeds = planned.tokens_per_second, packed_speed(planned, lengths, world)
        lines.append(packing_hint(lengths, context, *speeds))
    if data is not None and config.data.show_rows:
        lines += lines_of(data.rows, data.tokenizer, config.data.show_rows)
    if verbose:
        lines = [*machine_lines(world), *lines]
    rates = [rates_line(planned.record["rates"])] if verbose and planned.record["rates"] else []
    return [*lines, *planned.lines, *rates]


def check_room(config: Config, folder: Path, adapters: int, steps: int) -> None:
    """Raise UserError where the disk of the output folder has no space for what comes.

    adapters: their parameters. steps: that are left to do."""
    checkpoints = checkpoint_bytes(adapters, config.training.optimizer), most_at_once(config.output, folder, steps)
    copies = 3 if config.evaluation.save_best else 1  # the best, a better one being written, the last
    check_space(folder, 4 * adapters * copies * config.output.save_model, *checkpoints)


def note_run(config: Config, folder: Path, plan: dict[str, Any]) -> None:
    """Write the run's options and plan to its output folder."""
    with writing_to(folder, "output_dir"):
        save_config(config, folder / "config.yaml")
        write_plan(folder, plan)


def row_lengths(config: Config, rows: Rows) -> RowLengths:
    """Return the lengths of the rows, and of the bins that they are packed into."""
    return RowLengths.of(rows, Bins(rows.context_length, rows.lengths) if config.data.packing else None)


def lengths_to_plan(data: Data | None, lengths: RowLengths | None) -> RowLengths | None:
    """Return the lengths that the plan is made for: of the rows that train, and at least of one to evaluate on."""
    if data is None or data.held_out is None or lengths is None:
        return lengths
    widest = data.held_out.widest
    return replace(lengths, widest=max(lengths.widest, widest), at_least=widest)


def make_batches(session: Session, rows: Rows, lengths: RowLengths | None) -> Batches:
    """Return this rank's micro-batches, as the session's plan has them."""
    world, plan, seed = session.world, session.planned.plan, session.config.training.seed
    flat = lengths if session.fusion.blocks else None
    return Batches(rows, plan.micro_batch, plan.accumulation, world.size, world.rank, seed, flat)


def count_steps(config: Config, batches: Batches) -> int:
    """Return the optimizer steps of the run."""
    steps = batches.steps_per_epoch * config.training.num_epochs
    return min(steps, config.training.max_steps) if config.training.max_steps > 0 else steps
