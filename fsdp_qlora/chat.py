"""Conversations through the tokenizer's chat template, and which characters of the result the assistant wrote.

Few templates mark the assistant's words ({% generation %}), so they are found by rendering again: what the template
makes of the messages before a turn, with the assistant's header, is where that turn begins; what it makes of the
messages up to and including it tells where it ends. An answer ends with its last special token (`<|im_end|>`, `</s>`),
which is what generation stops at; the line break some templates put after it belongs to nobody.
"""

import re
from collections.abc import Callable
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.errors import UserError
from fsdp_qlora.sources import Row
from fsdp_qlora.templates import Example, Piece, Template

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]
OPEN_TAG = re.compile(r"<\w*$")


def chat_template(tokenizer: PreTrainedTokenizerBase, dataset: str) -> Template:
    """The template for rows of `messages`, a list of {role, content}.

    Raises UserError if the tokenizer has no chat template and, row by row, if it does not take the messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"dataset {dataset!r}: has messages, but the model's tokenizer has no chat template; "
            "use an instruct model, or rows in alpaca, prompt/completion or text form"
        )
    specials = {str(token) for token in tokenizer.all_special_tokens}
    specials |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials.discard("")

    def render(messages: list[Message], answer_next: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next))

    def template(row: Row, place: str) -> Example:
        messages = _messages(row, place)
        try:
            return _split(messages, render, specials, str(tokenizer.eos_token or ""))
        except (jinja2.TemplateError, TypeError, _Unclear) as error:  # TypeError: content that is no text
            raise UserError(f"{place}: the model's chat template does not take these messages ({error})") from error

    return template


class _Unclear(Exception):
    """Where a turn begins or ends cannot be told."""


def _messages(row: Row, place: str) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: 'messages' must be a list of {{role, content}}, but is {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(
                f"{place}: message {number} must be an object with 'role' and 'content', but is {message!r:.80}"
            )
    return messages


def _split(messages: list[Message], render: Render, specials: set[str], eos: str) -> Example:
    whole = render(messages, False)
    pieces, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(messages, number, whole, render, specials)
            start = max(start, done)
            pieces += [Piece(whole[done:start], False), Piece(whole[start:end], True)]
            done = end
    if messages[-1]["role"] != "assistant":
        pieces.append(Piece(whole[done:], False))
    elif not pieces[-1].text.endswith(tuple(specials)):
        pieces[-1].text += eos  # the template leaves the answer open: without this the model would not learn to stop
    return Example([piece for piece in pieces if piece.text], complete=True)


def _turn(messages: list[Message], number: int, whole: str, render: Render, specials: set[str]) -> tuple[int, int]:
    """[start, end) of message `number`, an assistant's, in `whole`."""
    before = render(messages[:number], True) if number else ""
    start = _common(whole, before)
    if start < len(before):  # the header ends in a tag such as <think> that this answer does not have
        start = len(OPEN_TAG.sub("", whole[:start]))
    upto = render(messages[: number + 1], False)
    end = _common(whole, upto)
    content = str(messages[number]["content"] or "").strip()
    if content not in whole[start:]:  # Qwen3 leaves the thought out once the conversation goes on
        content = content.rpartition("</think>")[2].strip()
    found = whole.find(content, start) if content else -1
    shown = end > start and (end == len(upto) or _last_special_end(whole, start, end, specials) > 0)
    if found < 0 and not shown:
        raise _Unclear(f"message {number} is not in what it renders")
    spoken = start if found < 0 else found + len(content)
    if end < spoken:  # written differently while it was the last turn: what follows the words there, follows them here
        end = spoken + _common(whole[spoken:], upto[upto.rfind(content) + len(content) :])
    return start, _last_special_end(whole, spoken, end, specials) or end


def _common(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    if a.startswith(b):
        return len(b)
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _last_special_end(text: str, start: int, stop: int, specials: set[str]) -> int:
    """Where the last special token that lies whole in text[start:stop] ends; 0 if there is none."""
    places = ((text.rfind(token, start, stop), len(token)) for token in specials)
    return max((place + length for place, length in places if place >= 0), default=0)
