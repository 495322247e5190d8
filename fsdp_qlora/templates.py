"""What a row says: which columns are the prompt, which the answer, and the words around them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fsdp_qlora.errors import UserError
from fsdp_qlora.sources import Row


@dataclass
class Piece:
    """A stretch of text that is tokenized on its own, so that no token crosses from a prompt into an answer."""

    text: str
    is_answer: bool


@dataclass
class Example:
    """A row as text: pieces in order. `complete`: the text has its own BOS and end-of-turn tokens (chat templates)."""

    pieces: list[Piece] = field(default_factory=list)
    complete: bool = False


Template = Callable[[Row, str], Example]  # (row, place for messages) -> Example

# Stanford Alpaca's two prompts, and fsdp_qlora's two for question/answer rows: programs that serve such adapters use
# these words.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
QUESTION = "###Question:\n{question}\n###Answer:\n"
CONTEXT_QUESTION = "###Context:\n{context}\n" + QUESTION
TURN = re.compile(r"(### (?:Human|Assistant):)")


def text_of(row: Row, key: str, place: str, optional: bool = False) -> str:
    """The row's text under `key`; numbers are written out, an absent or null optional one is ''."""
    value: Any = row.get(key)
    if value is None and optional:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = "missing" if value is None else type(value).__name__
        raise UserError(f"{place}: {key!r} must be text, but is {found}; the row has {', '.join(map(str, row))}")
    return str(value)


def alpaca(row: Row, place: str) -> Example:
    """instruction, input (may be empty), output; prompt as Stanford Alpaca's."""
    given = text_of(row, "input", place, optional=True)
    prompt = (ALPACA if given else ALPACA_NO_INPUT).format(instruction=text_of(row, "instruction", place), input=given)
    return Example([Piece(prompt, False), Piece(text_of(row, "output", place), True)])


def question_answer(row: Row, place: str) -> Example:
    """question, answer, and context if there is one; prompt as fsdp_qlora's for sql and orca_math."""
    context = text_of(row, "context", place, optional=True)
    prompt = (CONTEXT_QUESTION if context else QUESTION).format(
        question=text_of(row, "question", place), context=context
    )
    return Example([Piece(prompt, False), Piece(text_of(row, "answer", place), True)])


def prompt_completion(row: Row, place: str) -> Example:
    """prompt, completion, as they are: whoever wrote them put the spaces where they belong."""
    return Example([Piece(text_of(row, "prompt", place), False), Piece(text_of(row, "completion", place), True)])


def text(row: Row, place: str) -> Example:
    """text: everything trains."""
    return Example([Piece(text_of(row, "text", place), True)])


def guanaco(row: Row, place: str) -> Example:
    """text holding '### Human: ...### Assistant: ...' turns: what follows '### Assistant:' is the answer."""
    example, speaker = Example(), ""
    for part in TURN.split(text_of(row, "text", place)):
        if TURN.fullmatch(part):
            speaker = part
            example.pieces.append(Piece(part, False))
        elif part:
            example.pieces.append(Piece(part, "Assistant" in speaker))
    return example


# What is recognised, in order: a row that fits several (alpaca rows often carry a ready-made `text` too) takes the
# first. (form, columns, template, the value of dataset_format it belongs to); messages need the tokenizer, see chat.py.
FORMS: list[tuple[str, tuple[str, ...], str]] = [
    ("messages", ("messages",), "messages"),
    ("prompt_completion", ("prompt", "completion"), "prompt_completion"),
    ("alpaca", ("instruction", "output"), "alpaca"),
    ("question_answer", ("question", "answer"), "alpaca"),
    ("text", ("text",), "text"),
]
TEMPLATES: dict[str, Template] = {
    "prompt_completion": prompt_completion,
    "alpaca": alpaca,
    "question_answer": question_answer,
    "text": text,
    "guanaco": guanaco,
}


def form_of(row: Row, dataset_format: str, dataset: str) -> str:
    """The form of a dataset from its first row's columns, among those `dataset_format` allows ('auto': all).

    Raises UserError naming the columns there are and the columns that would do.
    """
    allowed = [(form, columns) for form, columns, option in FORMS if dataset_format in ("auto", option)]
    for form, columns in allowed:
        if all(column in row for column in columns):
            return form
    wanted = "; or ".join(f"{' + '.join(columns)} ({form})" for form, columns in allowed)
    raise UserError(
        f"dataset {dataset!r}: dataset_format {dataset_format!r} does not fit its columns "
        f"{', '.join(map(str, row)) or '(none)'}; wanted: {wanted}"
    )
