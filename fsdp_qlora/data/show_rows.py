"""Rows as the model is taught them, what is learnt marked: for the eyes of the user, before anything is trained."""

import re
import sys
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.row_set import Rows

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
MARKS = ("«", "»")
ASCII_MARKS = ("<<", ">>")


def lines_of(rows: Rows, tokenizer: PreTrainedTokenizerBase | None, count: int) -> list[str]:
    """Return lines for the first `count` rows: their text, what is learnt in green on a terminal, in «» elsewhere."""
    colour = sys.stdout.isatty()
    begins, ends = (GREEN, PLAIN) if colour else MARKS
    if not colour and not _can_write("".join(MARKS)):
        begins, ends = ASCII_MARKS
    lines = [
        f"rows      the first {min(count, len(rows))}, what is learnt {'in green' if colour else f'in {begins}{ends}'}"
    ]
    for number in range(min(count, len(rows))):
        part = slice(rows.offsets[number], rows.offsets[number + 1])
        ids, trains = rows.ids[part].tolist(), rows.trains[part].tolist()
        lines.append(f"--- row {rows.index[number]}: {len(ids)} tokens, {sum(trains)} of them learnt")
        lines.append(
            "".join(f"{begins}{text}{ends}" if learn else text for learn, text in _spans(ids, trains, tokenizer))
        )
    return [*lines, "---"]


def _spans(ids: list[int], trains: list[bool], tokenizer: PreTrainedTokenizerBase | None) -> list[tuple[bool, str]]:
    """Return (learnt?, text) of the stretches of a row. Decoded from the beginning: tokenizers drop a first space."""
    spans: list[tuple[bool, str]] = []
    done, before = 0, ""
    for learn, group in groupby(trains):
        done += len(list(group))
        if tokenizer is None:
            text = " ".join(map(str, ids[:done]))
        else:
            text = tokenizer.decode(ids[:done], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append((learn, _harmless(text[len(before) :])))
        before = text
    return spans


def _harmless(text: str) -> str:
    """Return text without what would steer a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def _can_write(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
