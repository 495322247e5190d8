"""What evaluate measures on the rows that there are, checked before any weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fsdp_qlora.commands.answer_rows import Ready
from fsdp_qlora.commands.evaluate import EvaluateOptions
from fsdp_qlora.data.asked import Prompt, continuations
from fsdp_qlora.data.batches import Rows, load_rows
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import BadRow, UserError
from fsdp_qlora.generation.decoder import PROMPT_TOKENS
from fsdp_qlora.generation.likelihood import rows_of
from fsdp_qlora.generation.placing import Workload
from fsdp_qlora.generation.scores import choices_of
from fsdp_qlora.inference import tokenizer_of
from fsdp_qlora.models.skeleton import max_positions, text_config

MOST_TOKENS = {"cuda": PROMPT_TOKENS, "cpu": 2048}  # of a pass, padding included


@dataclass
class Task:
    """What is measured: rows for the loss; of each row how many choices it has and which is right, and all of them as
    rows. most_tokens: of a pass that measures losses, padding included."""

    measures: list[str]
    rows: Rows | None
    choices: list[tuple[int, int]]
    choice_rows: Rows | None
    most_tokens: int

    def workload(self, asked: EvaluateOptions, ready: Ready) -> Workload:
        """Return what it takes. Raises UserError where the model takes fewer tokens than an answer needs."""
        answers = "exact" in self.measures
        work = ready.workload(
            ready.capacity(asked.max_new_tokens if answers else 0), asked.batch_size if answers else 1
        )
        measured = [rows for rows in (self.rows, self.choice_rows) if rows is not None]
        if not measured:
            return work
        return replace(work, measured=self.most_tokens, widest=max(rows.widest for rows in measured))


def task_of(asked: EvaluateOptions, ready: Ready, world: World) -> Task:
    """Return what is to be measured. Raises UserError for a measure that the rows have no columns for."""
    wanted = _measures(asked, ready)
    choices, choice_rows = _choices(ready) if "choice" in wanted else ([], None)
    rows = None
    if "loss" in wanted:
        data, hf_config = ready.base.config.data, ready.compute.hf_config
        limit = min(asked.context_length, max_positions(hf_config) or asked.context_length)
        data = replace(data, context_length=limit, rows_cache=None)
        rows = load_rows(data, tokenizer_of(ready.base), text_config(hf_config).vocab_size)
        for note in rows.notes:
            world.say(f"          {note}")
    most = max(MOST_TOKENS[world.device.type], *(one.widest for one in (rows, choice_rows) if one is not None), 0)
    return Task(wanted, rows, choices, choice_rows, most)


def _measures(asked: EvaluateOptions, ready: Ready) -> list[str]:
    wanted, prompts = list(asked.measures), ready.prompts.prompts
    if "auto" in wanted:
        wanted = ["loss"]
        if all(prompt.row.get("choices") is not None for prompt in prompts):
            wanted.append("choice")
        elif all((prompt.answer or "").strip() for prompt in prompts):
            wanted.append("exact")
        if not any((prompt.answer or "").strip() for prompt in prompts) and ready.prompts.form != "text":
            wanted.remove("loss")
    if not wanted:
        raise UserError(
            f"dataset {asked.dataset!r}: its rows have neither answers nor choices; nothing can be measured"
        )
    if asked.at_least is not None and "exact" not in wanted:
        raise UserError(
            f"at_least {asked.at_least:g}: has no effect, as exact is not measured here; add it to measures"
        )
    return wanted


def check_row(measures: Sequence[str], prompt: Prompt) -> None:
    """Raise BadRow for a row that one of these measures cannot take."""
    if "exact" in measures and not (prompt.answer or "").strip():
        raise BadRow(f"{prompt.location}: has no answer to compare with")
    if {"auto", "choice"} & {*measures}:
        _choices_of(prompt)


def _choices_of(prompt: Prompt) -> tuple[list[str], int] | None:
    named = prompt.answer if prompt.number is None else prompt.number
    return choices_of(prompt.row, named, prompt.location)


def _choices(ready: Ready) -> tuple[list[tuple[int, int]], Rows]:
    """Return (how many choices each row has and which is right, a row for each choice)."""
    found, pieces = list[tuple[int, int]](), list[tuple[list[int], list[int]]]()
    most = max_positions(ready.compute.hf_config)
    for prompt in ready.prompts.prompts:
        one = _choices_of(prompt)
        if one is None:
            raise UserError(f"measures: choice needs the column choices, which {prompt.location} does not have")
        ids = continuations(ready.tokenizer, one[0], prompt.text, ready.prompts.form)
        if not all(ids):
            raise BadRow(f"{prompt.location}: its choice {one[0][ids.index([])]!r} has no tokens")
        longest = len(prompt.ids) + max(map(len, ids))
        if most is not None and longest > most:
            raise UserError(
                f"measures: the model takes at most {most} tokens, and {prompt.location} has {longest} with its "
                "longest choice; leave out long rows"
            )
        found.append((len(ids), one[1]))
        pieces += [(prompt.ids, choice) for choice in ids]
    return found, rows_of(pieces, int(ready.tokenizer.pad_token_id or 0))
