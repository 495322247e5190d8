"""Words of a conversation replaced by stand-ins, and a rendering explained by them, character for character.

A chat template is a program: it trims, leaves out, repeats, and puts words of one turn into another. It is therefore
asked twice, with the real words and with stand-ins in their place. What lies between the stand-ins is the template's
own text. If the real rendering is that text and the real words and nothing else, then it is known of every character
who wrote it.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from fsdp_qlora.data.messages import THOUGHTS, Message

NONCE = "zQ7wJ"
STAND_IN = re.compile(NONCE + r"(\d+)k")
TAG = re.compile(r"</?\w+>")


@dataclass(frozen=True)
class Word:
    """Text of one message, for which a stand-in stands."""

    message: int
    text: str
    is_call: bool = False  # the name of a tool call

    @property
    def spellings(self) -> Iterator[str]:
        """Return a stand-in as it may be in a rendering: as it is, or inside JSON."""
        yield self.text
        yield _inside_json(self.text, False)
        yield _inside_json(self.text, True)


@dataclass(frozen=True)
class Spot:
    """A word as it stands in a rendering, and the template's text before and after it."""

    word: Word
    number: int  # of the stand-in
    start: int
    end: int


def replace_words(
    messages: list[Message], which: Collection[int], tags: Collection[str]
) -> tuple[list[Message], list[Word]]:
    """Return the messages with the text of those in `which` replaced by stand-ins, and what stand-in i stands for.

    Space around a text stays, and so do `tags` within it ("</think>"), at which templates cut.
    """
    words: list[Word] = []

    def stand_in(number: int, text: str, is_call: bool = False) -> str:
        inner = text.strip()
        if not inner:
            return text
        words.append(Word(number, inner, is_call))
        start = text.index(inner)
        return f"{text[:start]}{NONCE}{len(words) - 1}k{text[start + len(inner) :]}"

    def replaced(number: int, text: str) -> str:
        if not any(tag in text for tag in tags):
            return stand_in(number, text)
        parts, done = [], 0
        for tag in TAG.finditer(text):
            if tag[0] in tags:
                parts += [stand_in(number, text[done : tag.start()]), tag[0]]
                done = tag.end()
        return "".join([*parts, stand_in(number, text[done:])])

    made = []
    for number, message in enumerate(messages):
        if number in which:
            message = dict(message)
            for key in (*THOUGHTS, "content"):
                if isinstance(message.get(key), str):
                    message[key] = replaced(number, message[key])
            if message.get("tool_calls"):
                message["tool_calls"] = [_named_anew(call, stand_in, number) for call in message["tool_calls"]]
        made.append(message)
    return made, words


def _named_anew(call: dict[str, Any], stand_in: Any, number: int) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": stand_in(number, function["name"], True)}}


def take_apart(rendered: str) -> tuple[list[str], list[int]]:
    """Return a rendering with stand-ins as texts between them, n + 1, and the n stand-ins' numbers."""
    parts = STAND_IN.split(rendered)
    return parts[::2], [int(number) for number in parts[1::2]]


def explain(whole: str, between: list[str], numbers: list[int], words: list[Word]) -> list[Spot] | None:
    """Return where each stand-in's word is in `whole`; None unless texts and words make up all of `whole`."""
    if not whole.startswith(between[0]):
        return None
    spots, at = [], len(between[0])
    for number, after in zip(numbers, between[1:], strict=True):
        word = words[number]
        for spelling in word.spellings:
            if whole.startswith(spelling, at) and whole.startswith(after, at + len(spelling)):
                break
        else:
            return None
        spots.append(Spot(word, number, at, at + len(spelling)))
        at += len(spelling) + len(after)
    return spots if at == len(whole) else None


def _inside_json(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
