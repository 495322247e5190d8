"""The rows of a training run: read and tokenized, measured for the plan, dealt out as the plan has them."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fsdp_qlora.config.options import Config
from fsdp_qlora.data.batches import Batches, Rows, load_rows, load_tokenizer
from fsdp_qlora.data.held_out import rows_to_evaluate
from fsdp_qlora.data.packing import Bins
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.data.sources import check_sources, forget_stdin
from fsdp_qlora.distributed.alike import check_alike
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.models.skeleton import text_config
from fsdp_qlora.session import Session


@dataclass(frozen=True)
class Data:
    """The tokenized rows of a run and their tokenizer."""

    tokenizer: PreTrainedTokenizerBase | None  # None: the dummy dataset of a model without one
    rows: Rows  # to train on
    held_out: Rows | None  # to evaluate on


def read_data(config: Config, hf_config: PretrainedConfig, world: World) -> Data:
    """Return tokenizer and tokenized rows, which a node's first rank makes and its others find in the cache.

    A collective."""
    try:
        data = world.first_on_node(lambda: load_data(config, hf_config, progress=world.is_main))
    finally:
        if world.local_rank == 0:
            forget_stdin()
    if world.has_several_nodes:
        read = {"dataset": data.rows} | ({} if data.held_out is None else {"rows held out": data.held_out})
        told = {name: f"{len(rows):,} rows with the checksum {rows.digest[:12]}" for name, rows in read.items()}
        check_alike(told, world, "give every node the same files of rows, tokenizer and templates")
    return data


def load_data(config: Config, hf_config: PretrainedConfig, progress: bool) -> Data:
    """Return tokenizer and tokenized rows. The dummy dataset needs no tokenizer, and a model may be without one."""
    try:
        tokenizer = load_tokenizer(config.model.model_name, config.model.revision)
    except UserError:
        if config.data.dataset != "dummy":  # nor is its eval_dataset then
            raise
        tokenizer = None
    if config.evaluation.eval_dataset is not None:
        check_sources(config.evaluation.eval_dataset, "eval_dataset")
    vocabulary = text_config(hf_config).vocab_size
    rows = load_rows(config.data, tokenizer, vocabulary, progress)
    return Data(tokenizer, *rows_to_evaluate(config, rows, tokenizer, vocabulary, progress))


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
