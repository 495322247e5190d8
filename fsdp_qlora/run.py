"""A training run, stage by stage: checked, read, built, planned, loaded, trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.config.files import save as save_config
from fsdp_qlora.config.options import Config
from fsdp_qlora.data.batches import Batches
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.data.show_rows import lines_of
from fsdp_qlora.data.sources import parts_of
from fsdp_qlora.distributed.alike import check_nodes
from fsdp_qlora.distributed.shared_folder import check_shared
from fsdp_qlora.distributed.world import World, open_world
from fsdp_qlora.export.peft import check_space
from fsdp_qlora.models.skeleton import check_context, check_layers_stay
from fsdp_qlora.plan.planning import packed_speed, with_micro_batch, write_plan
from fsdp_qlora.report.loggers import check_installed
from fsdp_qlora.report.machine import Stages, environment, machine_lines, rates_line
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.profiler import check_profile
from fsdp_qlora.report.startup import (
    adapter_count,
    are_short,
    describe,
    describe_evaluation,
    describe_rows,
    packing_hint,
)
from fsdp_qlora.run_data import Data, count_steps, lengths_to_plan, make_batches, read_data, row_lengths
from fsdp_qlora.runtime.determinism import check_deterministic, deterministic_algorithms
from fsdp_qlora.runtime.files import Claim, check_elsewhere, writing_to
from fsdp_qlora.runtime.gpu_memory import hold_to_card
from fsdp_qlora.runtime.host_memory import HostMemory, give_back_freed
from fsdp_qlora.session import Session, choose_compute, prepare
from fsdp_qlora.training.agreement import base_of, check_base, check_place, place_in
from fsdp_qlora.training.checkpoint import Checkpoints, checkpoint_bytes, most_at_once
from fsdp_qlora.training.evaluate import Evaluator
from fsdp_qlora.training.evaluations import Asked, EvalAnswers, Evaluations, asked_of, check_evaluations, memory_of
from fsdp_qlora.training.loop import Loop
from fsdp_qlora.training.resume import Checkpoint, find_checkpoint, forget_others, notes_of
from fsdp_qlora.training.retry import Refit
from fsdp_qlora.training.step import Stepper
from fsdp_qlora.weights.base_cache.disk import Owed


@dataclass(frozen=True)
class PreparedRun:
    """A run that is read, built and planned. None of its weights is read, and its output folder is as it was."""

    session: Session
    data: Data | None  # None: --plan_only, which reads rows only to show them
    lengths: RowLengths | None
    batches: Batches | None
    checkpoint: Checkpoint | None  # where the run goes on
    noted: Config  # the options that repeat this run
    asked: Asked | None  # what held-out rows are asked after each evaluation
    environment: Mapping[str, Any]  # what it runs on

    @property
    def folder(self) -> Path:
        return Path(self.noted.output.output_dir)


@dataclass(frozen=True)
class Loaded:
    """The model of a run in its place, with what trains it."""

    stepper: Stepper
    refit: Refit
    evaluations: Evaluations | None


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
        check_nodes(config, world)
        checkpoint = begin(config, world, claim)
        ready = prepare_run(config, world, checkpoint, stages.done)
        for line in [*notes, *start_lines(ready)]:
            world.say(line)
        if config.memory.plan_only:
            return 0
        return train(ready, host, stages)


def begin(config: Config, world: World, claim: Claim) -> Checkpoint | None:
    """Check what needs neither rows nor model, and take the output folder. Return the checkpoint to go on from.

    A collective."""
    world.together(lambda: check_deterministic(config.training, world.device))
    if config.memory.plan_only:
        return None
    world.together(lambda: check_installed(config))
    world.together(lambda: check_profile(config.profile))
    allowed = config.output.resume is not None or config.output.overwrite_output_dir
    world.main_only(lambda: check_elsewhere(Path(config.output.output_dir), folders_read(config)))
    world.main_only(lambda: claim.take(Path(config.output.output_dir), allowed))
    if config.output.makes_checkpoints and world.has_several_nodes:
        check_shared(Path(config.output.output_dir), world)
    return find_checkpoint(config, world)


def folders_read(config: Config) -> list[tuple[str, Path]]:
    """Return what the run reads and must not write to: what each is, and its path, a folder's or not."""
    rows = [dataset for dataset in (config.data.dataset, config.evaluation.eval_dataset) if dataset is not None]
    return [
        ("model", Path(config.model.model_name)),
        *(("rows", Path(part.name)) for dataset in rows for part in parts_of(dataset)),
    ]


def prepare_run(
    config: Config, world: World, checkpoint: Checkpoint | None, done: Callable[[str], None]
) -> PreparedRun:
    """Read the rows, build the model and plan the run. A collective. done: told of each stage that has ended."""
    compute = choose_compute(config, world)
    world.together(lambda: check_context(config.data.context_length, compute.hf_config))
    world.together(lambda: check_layers_stay(compute.hf_config))
    reads = not config.memory.plan_only or config.data.show_rows
    data = read_data(config, compute.hf_config, world) if reads else None
    lengths = None if data is None else row_lengths(config, data.rows)
    asked = None
    if data is not None:
        held_out, tokenizer = data.held_out, data.tokenizer
        asked = world.first_on_node(lambda: asked_of(config, held_out, tokenizer, compute.hf_config))
    done("config and data")
    session = prepare(config, world, compute, lengths_to_plan(data, lengths), done, memory_of(config, asked))
    batches = None if data is None else make_batches(session, data.rows, lengths)
    chosen = session.planned.plan
    noted = with_micro_batch(config, chosen.micro_batch, chosen.accumulation)
    if checkpoint is not None:
        assert batches is not None
        world.main_only(partial(check_place, checkpoint, config, batches, count_steps(config, batches)))
    return PreparedRun(session, data, lengths, batches, checkpoint, noted, asked, environment(world))


def train(ready: PreparedRun, host: HostMemory, stages: Stages) -> int:
    """Load the model and train it. A collective. Returns the exit code."""
    session, data, batches = ready.session, ready.data, ready.batches
    assert data is not None
    assert batches is not None
    config, world, checkpoint = session.config, session.world, ready.checkpoint
    steps = count_steps(config, batches)
    world.together(lambda: check_evaluations(config.evaluation, steps, batches.steps_per_epoch))
    metrics = open_metrics(ready, steps)
    with metrics.starting():
        loaded = load(ready, data, batches, steps)
        stages.done("loading")
        if config.output.verbose:
            world.say(stages.line())
        checkpoints = go_on(ready, loaded, batches, metrics)
        world.main_only(partial(forget_others, ready.folder, checkpoint, world))
        loop = Loop(
            config, world, host, metrics, loaded.stepper, loaded.refit, batches, steps, data.tokenizer, ready.folder,
            checkpoints, loaded.evaluations,
        )  # fmt: skip
    return loop.run()


def open_metrics(ready: PreparedRun, steps: int) -> Metrics:
    """Open the record of a run of `steps` steps, and check the disk's space for all that it will write. A collective.

    What an earlier run of the folder left stays as it is until that run's checkpoint has been loaded."""
    checkpoint, noted, folder = ready.checkpoint, ready.noted, ready.folder
    model, world = ready.session.model, ready.session.world
    earlier = None if checkpoint is None else (checkpoint.run_folder(folder), checkpoint.step)
    metrics = world.together(lambda: Metrics(noted, world, steps, earlier, ready.environment))
    left = steps - (0 if checkpoint is None else checkpoint.step)
    with metrics.starting():
        world.main_only(lambda: check_room(noted, folder, adapter_count(model), left))
        if checkpoint is None:
            world.main_only(lambda: note_run(ready))
    return metrics


def load(ready: PreparedRun, data: Data, batches: Batches, steps: int) -> Loaded:
    """Read the weights to where the plan places them; return what trains over them. A collective."""
    session, planned = ready.session, ready.session.planned
    config, world, model = session.config, session.world, session.model
    layout = planned.layout if data.held_out is not None else None
    forward = None if layout is None else layout.of_forward()  # before a placement hooks into the model
    placement = session.place()
    refit = Refit(planned, model, placement, planned.facts.tokens, world, ready.folder)
    left = steps - (0 if ready.checkpoint is None else ready.checkpoint.step)
    adapters = session.load(placement, room_owed(ready.noted, ready.folder, adapter_count(model), left))
    give_back_freed()
    hold_to_card(config.memory.gpu_memory_gib, world.device)
    arena = refit.first_arena(adapters.exchange.widens)
    torch.manual_seed(config.training.seed + world.rank)  # only dropout draws from here on
    stepper = Stepper(model, adapters, config.training, steps, world, arena)
    evaluations = None
    if data.held_out is not None:
        evaluator = Evaluator(model, data.held_out, planned.facts.tokens, world, partial(stepper.lend, forward))
        answer = answer_of(ready, data)
        evaluations = Evaluations(config.evaluation, evaluator, steps, batches.steps_per_epoch, answer)
    return Loaded(stepper, refit, evaluations)


def answer_of(ready: PreparedRun, data: Data) -> Callable[[int], None]:
    """Return what answers held-out rows after an evaluation; nothing, where none are asked."""
    session, asked = ready.session, ready.asked
    if asked is None:
        return lambda step: None
    assert data.tokenizer is not None
    return EvalAnswers(session.model, asked, data.tokenizer, session.config.memory, session.world, ready.folder)


def go_on(ready: PreparedRun, loaded: Loaded, batches: Batches, metrics: Metrics) -> Checkpoints:
    """Return the writer of checkpoints, with all that it saves as the run's own checkpoint has it. A collective."""
    session, checkpoint, evaluations = ready.session, ready.checkpoint, loaded.evaluations
    world, folder, base = session.world, ready.folder, base_of(session.model, session.world.device)
    parts = {} if evaluations is None else {"evaluations": evaluations}
    checkpoints = Checkpoints(ready.noted, world, loaded.stepper, partial(place_in, batches), base, parts)
    if checkpoint is None:
        return checkpoints
    cache = next((unit.frozen.origin for unit in session.model.units if unit.frozen.origin), "")
    world.main_only(partial(check_base, checkpoint, session.config, base, checkpoints.adapters, world.say, cache))
    checkpoints.load(checkpoint)
    if evaluations is not None and not checkpoint.is_in(folder):
        evaluations.kept = None  # in the other folder
    world.main_only(metrics.take_over)  # from here on files of the run that goes on are changed
    world.main_only(lambda: note_run(ready))
    return checkpoints


def start_lines(ready: PreparedRun) -> list[str]:
    """Return what the run is about to do, for the user. A collective."""
    session, data, lengths = ready.session, ready.data, ready.lengths
    config, world, planned = session.config, session.world, session.planned
    compute, verbose, context = session.compute, config.output.verbose, config.data.context_length
    lines = describe(session.model, compute.hf_config, config, compute.attention, session.fusion, world)
    if ready.batches is not None:
        lines += describe_rows(config, ready.batches, count_steps(config, ready.batches), world)
    if data is not None and data.held_out is not None:
        lines += describe_evaluation(config.evaluation, data.held_out)
    if data is None and config.data.dataset != "dummy":
        lines.append(f"data      not read, rows taken to fill {context} tokens; --show_rows 1 reads and counts them")
    if lengths is not None and session.fusion.blocks and are_short(lengths, context):
        speeds = planned.tokens_per_second, packed_speed(planned, lengths, world)
        lines.append(packing_hint(lengths, context, *speeds))
    if data is not None and config.data.show_rows:
        lines += lines_of(data.rows, data.tokenizer, config.data.show_rows)
    if verbose:
        lines = [*machine_lines(ready.environment), *lines]
    rates = [rates_line(planned.record["rates"])] if verbose and planned.record["rates"] else []
    resumed = [] if ready.checkpoint is None else notes_of(ready.checkpoint, ready.noted, world)
    return [*lines, *planned.lines, *rates, *resumed]


def check_room(config: Config, folder: Path, adapters: int, steps: int) -> None:
    """Raise UserError where the disk of the output folder has no space for what comes.

    adapters: their parameters. steps: that are left to do."""
    check_space(folder, *_sizes(config, folder, adapters, steps))


def room_owed(config: Config, folder: Path, adapters: int, steps: int) -> Owed:
    """Return the disk space that `check_room` has promised: nothing else of the run may take it."""
    adapter, checkpoint, count = _sizes(config, folder, adapters, steps)
    return Owed(folder, adapter + checkpoint * count)


def _sizes(config: Config, folder: Path, adapters: int, steps: int) -> tuple[int, int, int]:
    """Return (bytes of all copies of the adapter, bytes of a checkpoint, how many of these there may be at once)."""
    copies = 3 if config.evaluation.save_best else 1  # the best, a better one being written, the last
    count = most_at_once(config.output, folder, steps)
    return (
        4 * adapters * copies * config.output.save_model,
        checkpoint_bytes(adapters, config.training.optimizer),
        count,
    )


def note_run(ready: PreparedRun) -> None:
    """Write the run's options and plan to its output folder."""
    with writing_to(ready.folder, "output_dir"):
        save_config(ready.noted, ready.folder / "config.yaml")
        write_plan(ready.folder, ready.session.planned.record)
