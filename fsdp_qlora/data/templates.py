"""Prompts and answers: what each form of row is put into words as, which of the text is learnt."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fsdp_qlora.errors import BadRow

Row = dict[str, Any]
WORDLESS = "an answer without text, of which {} is learnt"  # a note: its end, or nothing


@dataclass
class Piece:
    """A stretch of a row's text. `ends`: EOS follows it, learnt as the piece is."""

    text: str
    is_answer: bool
    ends: bool = False


@dataclass
class Example:
    """A row as text: pieces in order.

    complete: the text has its own BOS and end-of-turn tokens (chat templates), and is tokenized as one. Otherwise each
    piece is tokenized on its own, so that no token crosses from a prompt into an answer. notes: what the user should
    know, counted over the dataset. empty: why nothing of it is learnt, where that is known.
    """

    pieces: list[Piece] = field(default_factory=list)
    complete: bool = False
    notes: list[str] = field(default_factory=list)
    empty: str = ""


Template = Callable[[Row, str], Example]  # (row by field names, location for messages) -> Example

# Stanford Alpaca's two prompts, and fsdp_qlora's two for question/answer rows: programs that serve such adapters use
# these words.
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_SYSTEM_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
ALPACA_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:"
QUESTION = "###Question:\n{question}\n###Answer:\n"
CONTEXT_QUESTION = "###Context:\n{context}\n" + QUESTION
TURN = re.compile(r"(### (?:Human|Assistant):)")


def text_of(row: Row, key: str, location: str, optional: bool = False) -> str:
    """Return the row's text under `key`; numbers are written out, an absent or null optional one is ''.

    Raises BadRow for all else, NaN and the infinities among it: written out they would be words.
    """
    value: Any = row.get(key)
    if value is None and optional:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f'{location}: {key!r} is {value}, which is no text; write null or ""')
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = "missing" if key not in row else "null" if value is None else type(value).__name__
        raise BadRow(f"{location}: {key!r} must be text, but is {found}; the row has {', '.join(map(str, row))}")
    return str(value)


def alpaca(row: Row, location: str) -> Example:
    """Render instruction, input (may be empty), output; prompt as Stanford Alpaca's.

    LLaMA-Factory's two columns: `system` takes the place of the first sentences, `history` holds earlier rounds of
    [instruction, answer], whose answers are learnt too.
    """
    given = text_of(row, "input", location, optional=True)
    asked = ALPACA if given else ALPACA_NO_INPUT
    system = text_of(row, "system", location, optional=True) or (ALPACA_SYSTEM if given else ALPACA_SYSTEM_NO_INPUT)
    example, lead = Example(), system + "\n\n"
    for question, answer in _history(row, location):
        example.pieces.append(Piece(lead + ALPACA_NO_INPUT.format(instruction=question), False))
        example.pieces.append(Piece(answer, True, ends=True))
        lead = "\n\n"
    prompt = lead + asked.format(instruction=text_of(row, "instruction", location), input=given)
    example.pieces += [Piece(prompt, False), Piece(text_of(row, "output", location), True)]
    return example


def _history(row: Row, location: str) -> Iterator[tuple[str, str]]:
    rounds = row.get("history") or []
    if not isinstance(rounds, list):
        raise BadRow(f"{location}: 'history' must be a list of [instruction, answer], but is {type(rounds).__name__}")
    for number, pair in enumerate(rounds):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{location}: round {number} of 'history' must be [instruction, answer], but is {pair!r:.80}")
        both = {"instruction": pair[0], "answer": pair[1]}
        where = f"{location}, round {number} of 'history'"
        yield text_of(both, "instruction", where), text_of(both, "answer", where)


def question_answer(row: Row, location: str) -> Example:
    """Render question, answer, and context if there is one; prompt as fsdp_qlora's for sql and orca_math."""
    context = text_of(row, "context", location, optional=True)
    prompt = (CONTEXT_QUESTION if context else QUESTION).format(
        question=text_of(row, "question", location), context=context
    )
    return Example([Piece(prompt, False), Piece(text_of(row, "answer", location), True)])


def prompt_completion(row: Row, location: str) -> Example:
    """Render prompt and completion as they are: their author put the spaces where they belong."""
    return Example([Piece(text_of(row, "prompt", location), False), Piece(text_of(row, "completion", location), True)])


def text(row: Row, location: str) -> Example:
    """Render text: everything trains."""
    return Example([Piece(text_of(row, "text", location), True)])


def guanaco(row: Row, location: str) -> Example:
    """Render text of '### Human: ...### Assistant: ...' turns: what follows '### Assistant:' is the answer."""
    example, speaker = Example(), ""
    for part in TURN.split(text_of(row, "text", location)):
        if TURN.fullmatch(part):
            speaker = part
            example.pieces.append(Piece(part, False))
        elif part:
            example.pieces.append(Piece(part, "Assistant" in speaker))
    return example
