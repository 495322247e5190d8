"""Conversations through the chat template, and which characters of the ONE rendering the assistant wrote.

`{% generation %}` marks where the template has them; else `turns` proves each turn from renderings with stand-ins in
the place of the words. Where nothing is certain the row is refused: labels are never guessed. docs/rows.md has a table
of templates' habits.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.marks import CLOSES, MARK, MARKING, OPENS, as_calls, read_marks
from fsdp_qlora.data.messages import ASSISTANT, THOUGHTS, Message, Talk, TalkReader
from fsdp_qlora.data.stand_ins import NONCE, TAG, take_apart
from fsdp_qlora.data.templates import WORDLESS, Example, Piece, Row
from fsdp_qlora.data.turns import Span, TurnFinder
from fsdp_qlora.errors import BadRow, UserError, first_line


def choose_chat_template(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> None:
    """Give the tokenizer the one chat template of the run: a file's, or a named one of several; saved with it later.

    Raises UserError for a file that cannot be read and a name that the tokenizer does not have.
    """
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if asked is None:
        if named and "default" not in named:
            if len(named) > 1:
                raise UserError(
                    f"chat_template: the tokenizer has several and no default: {', '.join(named)}; choose one with "
                    f"--chat_template {next(iter(named))}"
                )
            tokenizer.chat_template = next(iter(named.values()))
        return
    if asked in named:
        tokenizer.chat_template = named[asked]
        return
    tokenizer.chat_template = read_template(
        asked, "chat_template", f" (named ones: {', '.join(named)})" if named else ""
    )


def read_template(path: str, option: str, more: str = "") -> str:
    """Return the text of a Jinja file. Raises UserError where it cannot be read or is no Jinja."""
    import jinja2

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        environment.parse(MARK.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{option}: {path}, line {error.lineno}: is no Jinja template ({error.message})") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"{option}: {path} cannot be read ({reason}); give a Jinja file{more}") from error
    return text.removesuffix("\n")


class ChatTemplate:
    """Rows of `messages` -> examples, through the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dataset: str, train_on_prompt: bool = False):
        """Raise UserError if the tokenizer has no chat template."""
        if not tokenizer.chat_template:
            raise UserError(
                f"dataset {dataset!r}: has messages, but the model's tokenizer has no chat template; "
                "use an instruct model, --chat_template file.jinja, or rows in alpaca, prompt/completion or text form"
            )
        self.tokenizer, self.whole_row = tokenizer, train_on_prompt
        chosen = tokenizer.chat_template
        self.text = str(chosen if isinstance(chosen, str) else chosen.get("default", ""))
        texts = "".join(chosen.values()) if isinstance(chosen, dict) else self.text
        specials = {str(token) for token in tokenizer.all_special_tokens}
        specials |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.specials = tuple(specials - {""})
        self.eos = str(tokenizer.eos_token or "")
        self.reader = TalkReader(texts)
        tags = set(TAG.findall(texts))
        self.finder = TurnFinder(self.render, set(self.specials), self.eos, tags)
        self.marked = self._marked_template() if isinstance(chosen, str) else None
        self.wants_parts = self._wants_parts()
        self.ends: list[str] | None = None

    def __call__(self, row: Row, location: str) -> Example:
        """Return the row as text and what of it is learnt. Raises BadRow where that is not certain."""
        talk = self.reader.read(row, location)
        try:
            whole = self._whole(talk)
            if self.whole_row:
                return Example([Piece(whole, True)], complete=True, notes=talk.notes)
            spans = self._spans(talk, whole)
        except Exception as error:  # a template is a program: it raises whatever it raises
            raise BadRow(
                f"{location}: the model's chat template does not take these messages ({first_line(error)})"
            ) from error
        return self._example(talk, whole, spans)

    def prompt(self, row: Row, location: str) -> tuple[Example, str | None]:
        """Return (the conversation up to the assistant's turn, that turn's text where the row's last turn is one).

        Raises BadRow for what the template does not take, and for a conversation that asks for nothing."""
        talk, answer = self.reader.read(row, location), None
        if talk.messages[-1]["role"] == ASSISTANT:
            answer = str(talk.messages.pop().get("content") or "")
        if not talk.messages or talk.messages[-1]["role"] in (ASSISTANT, "system"):
            raise BadRow(f"{location}: the conversation has no turn that asks for an answer")
        try:
            text = self.render(talk.messages, True, talk)
        except Exception as error:  # a template is a program: it raises whatever it raises
            raise BadRow(
                f"{location}: the model's chat template does not take these messages ({first_line(error)})"
            ) from error
        return Example([Piece(text, False)], complete=True), answer

    def render(self, messages: list[Message], answer_next: bool, talk: Talk, template: str | None = None) -> str:
        """Return what the template makes of messages, asking for an answer at the end if `answer_next`."""
        if self.wants_parts:
            messages = [_in_parts(message) for message in messages]
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=talk.tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=answer_next,
                **talk.settings,
            )
        )

    def _whole(self, talk: Talk) -> str:
        """Render a conversation. Templates want the arguments of tool calls as objects; a few as their JSON text."""
        try:
            return self.render(talk.messages, False, talk)
        except TypeError:
            if not any("tool_calls" in message for message in talk.messages):
                raise
            talk.messages = [_with_arguments_as_text(message) for message in talk.messages]
            return self.render(talk.messages, False, talk)

    def _spans(self, talk: Talk, whole: str) -> list[Span]:
        if not any(talk.learn):
            return []
        if self.marked is not None:
            marked = self._marked_spans(talk, whole)
            if marked is not None:
                return marked
        found, missing = self.finder.find(talk, whole)
        taken = {number for number, _ in found}
        for number, (message, learn) in enumerate(zip(talk.messages, talk.learn, strict=True)):
            if learn and _is_wordless(message):
                what = "its end" if number in taken else "nothing"
                talk.notes.append(WORDLESS.format(what))
        for number, all_of_it in missing.items():
            what, role = "text" if all_of_it else "a part of the text", str(talk.messages[number]["role"])
            turn = f"{'an' if role == ASSISTANT else 'a'} {role} turn"
            talk.notes.append(f"{what} of {turn}, which the chat template leaves out")
        return [span for _, span in found]

    def _marked_template(self) -> str | None:
        """Return the template with private characters around what it marks as generated, None if it marks nothing."""
        if not any(mark[2] == "generation" for mark in MARK.finditer(self.text)):
            return None

        return MARKING + as_calls(self.text)

    def _marked_spans(self, talk: Talk, whole: str) -> list[Span] | None:
        """Return the spans that the template marks, None if it marks no turn, or if some turns are not to be learnt and
        marks cannot be told apart."""
        if OPENS in whole or CLOSES in whole:
            return None
        plain, spans = read_marks(self.render(talk.messages, False, talk, self.marked))
        if plain != whole or not spans:
            return None
        answers = [
            learn for message, learn in zip(talk.messages, talk.learn, strict=True) if message["role"] == ASSISTANT
        ]
        if not all(answers):
            if len(answers) != len(spans):
                return None
            spans = [span for span, learn in zip(spans, answers, strict=True) if learn]
        ended = [(start, self._through_end(whole, end)) for start, end in spans if start < end]
        return [(max(start, before), end) for (_, before), (start, end) in pairwise([(0, 0), *ended]) if end > before]

    def _through_end(self, whole: str, end: int) -> int:
        """Include the token that ends a turn where the template's mark stops short of it.

        The turn would never be learnt to end otherwise."""
        if whole[:end].rstrip().endswith(self.specials):
            return end
        at = end + len(whole[end:]) - len(whole[end:].lstrip())
        return next((at + len(token) for token in self.end_tokens() if whole.startswith(token, at)), end)

    def end_tokens(self) -> list[str]:
        """Return EOS, and the special token that the template puts behind an answer at the end of a conversation."""
        if self.ends is None:
            said: list[Message] = [{"role": r, "content": f"{NONCE}{i}k"} for i, r in enumerate(("user", "assistant"))]
            try:
                behind = self.finder.special.search(take_apart(self.render(said, False, Talk([], [])))[0][-1])
            except Exception:
                behind = None
            self.ends = [token for token in (self.eos, behind[0] if behind else "") if token]
        return self.ends

    def _example(self, talk: Talk, whole: str, spans: list[Span]) -> Example:
        pieces, done = [], 0
        for start, end in spans:
            pieces += [Piece(whole[done:start], False), Piece(whole[start:end], True)]
            done = end
        last = spans and talk.learn[-1] and not whole[done:].strip()
        if last and not whole[:done].rstrip().endswith(self.specials):
            pieces[-1].text += self.eos  # the template leaves the answer open: without this it would not learn to stop
        else:
            pieces.append(Piece(whole[done:], False))
        example = Example([piece for piece in pieces if piece.text], complete=True, notes=talk.notes)
        if not spans:
            roles = dict.fromkeys(message["role"] for message in talk.messages)
            what = "text of" if any(talk.learn) else "turn of"
            example.empty = f"no {what} the assistant's to learn (roles: {', '.join(roles)})"
        return example

    def _wants_parts(self) -> bool:
        """Return whether the template takes content only as a list of parts, as some of vision-language models do."""
        self.wants_parts = False
        question = [{"role": "user", "content": f"{NONCE}0k"}]
        for self.wants_parts in (False, True):
            try:
                if f"{NONCE}0k" in self.render(question, True, Talk([], [])):
                    return self.wants_parts
            except Exception:
                continue
        return False


def _is_wordless(message: Message) -> bool:
    texts = [message["content"], *(message.get(name) for name in THOUGHTS)]
    return not message.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def _with_arguments_as_text(message: Message) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
