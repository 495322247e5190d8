"""The rows of a run: read, recognised, put into words, tokenized; from the cache where they have been before."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.columns import read_columns
from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data import rows_cache
from fsdp_qlora.data.chat import ChatTemplate, choose_chat_template, read_template
from fsdp_qlora.data.forms import CHAT, GUANACO, Columns, Form, form_of, refuse_verdicts, renamed
from fsdp_qlora.data.json_files import parse_line
from fsdp_qlora.data.packed import Placed
from fsdp_qlora.data.prompts import PromptTemplate
from fsdp_qlora.data.row_set import Rows, merged
from fsdp_qlora.data.sources import Source, open_source, parts_of, told_as
from fsdp_qlora.data.templates import Template
from fsdp_qlora.data.tokenizing import BEYOND, Chunk, Work, tokenize
from fsdp_qlora.data.tokens import Encoder
from fsdp_qlora.errors import BadRow, UserError
from fsdp_qlora.units import count_of

DUMMY_SAMPLES = 512
SPREAD = 0.6  # of the logarithm of the lengths of instructions with their answers, as Alpaca has them


def load_rows(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    progress: bool = False,
) -> Rows:
    """Read, recognise, tokenize and truncate the dataset of `options`. `dummy` needs no tokenizer.

    vocab_size: rows of the model's embedding. progress: show how far it is. Raises UserError: missing or malformed file
    (with the line), columns that fit no form, no rows at all, no row with a label left, a token the model has no
    embedding for.
    """
    context = options.context_length
    if options.dataset == "dummy":
        return _dummy(options.dataset_samples or DUMMY_SAMPLES, options.dummy_row_tokens, context, vocab_size)
    assert tokenizer is not None, "only the dummy dataset needs no tokenizer"
    choose_chat_template(tokenizer, options.chat_template)
    return _merged_rows(options, tokenizer, vocab_size, progress)


def load_other_rows(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, vocab_size: int, progress: bool = False
) -> Rows:
    """Read the dataset of `options`, to evaluate on, after `load_rows` with the same tokenizer. Raises as that does."""
    with told_as("eval_dataset"):
        return _merged_rows(options, tokenizer, vocab_size, progress, held_out=True)


def _merged_rows(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, vocab_size: int, progress: bool, held_out: bool = False
) -> Rows:
    """Return the rows of all datasets that `options` name."""
    parts = parts_of(options.dataset)
    samples = [options.dataset_samples if part.weight is None else None for part in parts]
    sources = [open_source(part.name, n, held_out) for part, n in zip(parts, samples, strict=True)]
    alone = len(parts) == 1 and not held_out
    every = [_part_rows(*given, options, tokenizer, progress, alone) for given in zip(sources, samples, strict=True)]
    if not held_out:  # rows to evaluate on are read with the training rows' options
        _check_effect({rows.form for rows in every}, options)
    rows = merged(every, parts, options.dataset_samples)
    asked = options.dataset_samples
    if asked is not None and rows.n_read < asked:
        rows.notes.append(f"there are no more, of {'eval' if held_out else 'dataset'}_samples {asked}")
    if rows.pad_id >= vocab_size:  # which one does not matter: padding is masked by its position
        rows.pad_id = 0
    if int(rows.ids.max()) >= vocab_size:
        top = int(rows.ids.max())
        raise UserError(
            f"the tokenizer makes token {top}, but the model has {vocab_size} embeddings: they do not match"
        )
    return rows


def _part_rows(
    source: Source,
    samples: int | None,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool,
    alone: bool,
) -> Rows:
    """Return the rows of one dataset, the first `samples`: from the cache, or tokenized and kept there.

    alone: options that do nothing for rows of its form are refused before those are tokenized."""
    prompt = read_template(options.prompt_template, "prompt_template") if options.prompt_template is not None else ""
    cache = rows_cache.Cache(options, tokenizer, source, samples, prompt)
    held = cache.load()
    if held is None:
        held = _tokenized(source, options, prompt, tokenizer, progress, alone)
        cache.save(held)
    rows = Rows(**{**held, "name": source.name})
    rows.notes = [*source.notes, *rows.notes, *cache.notes]
    return rows


def _tokenized(
    source: Source, options: DataOptions, prompt: str, tokenizer: PreTrainedTokenizerBase, progress: bool, alone: bool
) -> dict[str, Any]:
    context, named = options.context_length, read_columns(options.columns or [])
    first, form, bad = _first(source, options, named)
    if alone:
        _check_effect({form.name}, options)
    template = _template(form, options, prompt, tokenizer, source.name)
    split = form.name == "text" and options.text_overflow != "cut"
    encoder = Encoder(tokenizer, options.train_on_prompt)
    columns = Columns(form, named, wary=options.dataset_format == "auto" and form not in (GUANACO, PromptTemplate.FORM))
    work = Work(source.name, columns, template, encoder, context, split, options.bad_rows == "skip")
    chunks = tokenize(work, chain(bad, first, source.rows), progress)
    held = _gathered(chunks, context)
    labels = held["offsets"][-1]
    if not labels:
        raise UserError(_nothing_left(source.name, chunks, context))
    return {"name": source.name, "form": form.name, "pad_id": int(tokenizer.pad_token_id or 0), **held}


def _first(source: Source, options: DataOptions, named: dict[str, str]) -> tuple[list[Placed], Form, list[Placed]]:
    """Return the first row that can be read, the form that it shows, and the rows before it."""
    bad: list[Placed] = []
    for location, raw in source.rows:
        where = f"dataset {source.name!r}: {location}"
        try:
            row = renamed(parse_line(where, raw), named, where)
        except BadRow:
            if options.bad_rows != "skip":
                raise
            bad.append((location, raw))
            continue
        if options.prompt_template is not None:
            form = PromptTemplate.FORM
        elif options.dataset_format == "auto" and source.form == "guanaco":
            form = GUANACO
        else:
            form = form_of(row, options.dataset_format, source.name, named)
            if options.dataset_format == "auto":
                refuse_verdicts(row, form, source.name)
        return [(location, raw)], form, bad
    if bad:
        raise UserError(f"dataset {source.name!r}: none of its {len(bad):,} rows can be read")
    raise UserError(f"dataset {source.name!r}: has no rows")


def _check_effect(forms: set[str], options: DataOptions) -> None:
    """Refuse an option that does nothing for rows of these forms, which are all that there are."""
    on = f"has no effect on rows of the form {' or '.join(sorted(forms))} (dataset {options.dataset!r})"
    if options.chat_template is not None and not forms & set(CHAT):
        raise UserError(f"chat_template {options.chat_template}: {on}; omit it")
    if options.text_overflow != "auto" and "text" not in forms:
        raise UserError(f"text_overflow {options.text_overflow}: {on}, which are cut; omit it")
    if options.train_on_prompt and forms == {"text"}:
        raise UserError(f"train_on_prompt true: {on}, which are learnt whole; omit it")


def _template(form: Form, options: DataOptions, prompt: str, tokenizer: PreTrainedTokenizerBase, name: str) -> Template:
    if options.prompt_template is not None:
        return PromptTemplate(prompt, options.prompt_template, read_columns(options.columns or []))
    if form.name in CHAT:
        return ChatTemplate(tokenizer, name, options.train_on_prompt)
    assert form.template is not None
    return form.template


def _gathered(chunks: list[Chunk], context: int) -> dict[str, Any]:
    dropped, notes = Counter[str](), Counter[str]()
    seen, used, bad = set[str](), set[str](), list[str]()
    for chunk in chunks:
        dropped += chunk.dropped
        notes += chunk.notes
        seen |= chunk.seen
        used |= chunk.used
        bad += chunk.bad
    lengths = np.concatenate([chunk.lengths for chunk in chunks] or [np.empty(0, np.int64)])
    n_read, n_truncated = sum(c.n_read for c in chunks), sum(c.n_truncated for c in chunks)
    n_bad, n_cut = sum(c.n_bad for c in chunks), sum(c.n_cut for c in chunks)
    told = []
    if unused := sorted(seen - used):
        told.append(f"columns not used: {', '.join(unused)}")
    if n_split := sum(chunk.n_split for chunk in chunks):
        told.append(f"{count_of(n_split, 'long text')} split at context_length {context}")
    if n_truncated:
        told.append(f"{count_of(n_truncated, 'row')} cut at context_length {context} ({count_of(n_cut, 'token')} lost)")
    told += [f"{count_of(n, 'row')} left out: {why.format(context=context)}" for why, n in dropped.most_common()]
    if n_bad:
        some = "; ".join([*(line[:120] for line in bad[:3]), *(["..."] if n_bad > 3 else [])])
        told.append(f"{count_of(n_bad, 'bad row')} left out ({some})")
    told += [f"{note} ({count_of(n, 'row')})" for note, n in notes.most_common()]
    return {
        "ids": np.concatenate([chunk.ids for chunk in chunks] or [np.empty(0, np.int32)]),
        "trains": np.concatenate([chunk.trains for chunk in chunks] or [np.empty(0, np.bool_)]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "index": np.concatenate([chunk.index for chunk in chunks] or [np.empty(0, np.int64)]),
        "context_length": context,
        "n_read": n_read,
        "n_dropped": sum(dropped.values()),
        "n_truncated": n_truncated,
        "notes": told,
    }


def _nothing_left(name: str, chunks: list[Chunk], context: int) -> str:
    n_read, n_bad = sum(chunk.n_read for chunk in chunks), sum(chunk.n_bad for chunk in chunks)
    dropped = sum((chunk.dropped for chunk in chunks), Counter[str]())
    if not n_read:
        return f"dataset {name!r}: has no rows"
    if n_bad == n_read:
        bad = next(line for chunk in chunks for line in chunk.bad)
        return f"dataset {name!r}: none of its {count_of(n_read, 'row')} can be taken; the first: {bad}"
    beyond = BEYOND in dropped
    says = "" if beyond and len(dropped) == 1 else "; ".join(f"{n:,}: {why}" for why, n in dropped.most_common())
    says = f" ({says.format(context=context)})" if says else f" within context_length {context}"
    advice = (
        "raise context_length, or check that answers are not empty" if beyond else "see --dataset_format and --columns"
    )
    return f"dataset {name!r}: none of its {count_of(n_read, 'row')} has an answer token{says}; {advice}"


def _dummy(samples: int, mean: int | None, context_length: int, vocab_size: int) -> Rows:
    """Return random tokens, each a label, to measure speed and memory. mean: of a row; None: all fill the context."""
    generator = np.random.default_rng(0)
    lengths = np.full(samples, context_length)
    if mean is not None:
        spread = generator.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, samples)
        lengths = np.clip(spread.round().astype(np.int64), 2, context_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = generator.integers(0, vocab_size, offsets[-1], dtype=np.int32)
    trains = np.ones(len(ids), dtype=np.bool_)
    trains[offsets[:-1]] = False
    counts = (context_length, 0, samples, 0, 0)
    return Rows("dummy", "random tokens", ids, trains, offsets, np.arange(samples), *counts)
