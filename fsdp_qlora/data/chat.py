"""Conversations through the chat template, and which characters of the ONE rendering the assistant wrote.

`{% generation %}` marks where the template has them; else `turns` proves each turn from renderings with stand-ins in
the place of the words. Where nothing is certain the row is refused: labels are never guessed. docs/rows.md has a table
of templates' habits.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.marked_turns import MarkedTurns
from fsdp_qlora.data.marks import MARK
from fsdp_qlora.data.messages import ASSISTANT, Message, Talk, TalkReader, is_wordless
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
        self.marked: MarkedTurns | None = None
        if isinstance(chosen, str) and MarkedTurns.has_marks(chosen):
            self.marked = MarkedTurns(self.render, chosen, tags, self.specials, self.end_tokens)
        self.wants_parts = self._wants_parts()
        self.ends: list[str] | None = None

    def __call__(self, row: Row, location: str) -> Example:
        """Return the row as text and what of it is learnt. Raises BadRow where that is not certain."""
        talk = self.reader.read(row, location)
        try:
            whole = self._whole(talk)
            if self.whole_row:
                return self._whole_example(talk, whole, location)
            spans = self._spans(talk, whole)
        except BadRow:
            raise
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
        marked = self.marked.find(talk, whole) if self.marked is not None else None
        found, missing = marked if marked is not None else self.finder.find(talk, whole)
        taken = {number for number, _ in found}
        for number, (message, learn) in enumerate(zip(talk.messages, talk.learn, strict=True)):
            if learn and is_wordless(message):
                what = "its end" if number in taken else "nothing"
                talk.notes.append(WORDLESS.format(what))
        for number, all_of_it in missing.items():
            what, role = "text" if all_of_it else "a part of the text", str(talk.messages[number]["role"])
            turn = f"{'an' if role == ASSISTANT else 'a'} {role} turn"
            talk.notes.append(f"{what} of {turn}, which the chat template leaves out")
        return [span for _, span in found]

    def end_tokens(self) -> list[str]:
        """Return EOS, and the special token that the template puts behind an answer at the end of a conversation."""
        if self.ends is None:
            said: list[Message] = [{"role": r, "content": f"{NONCE}{i}k"} for i, r in enumerate(("user", "assistant"))]
            try:
                last = take_apart(self.render(said, False, Talk([], [])))[0][-1]
                behind = self.finder.special.search(last.removesuffix(self.finder.template.unasked(Talk([], []))))
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

    def _whole_example(self, talk: Talk, whole: str, location: str) -> Example:
        """Return the row with all of it learnt, EOS behind an answer that the template leaves open too."""
        if talk.excluded:
            raise BadRow(
                f"{location}: message {talk.excluded[0]} is excluded from the loss, but train_on_prompt true learns "
                "every turn; omit train_on_prompt, or take the turn's weight away"
            )
        header = self.finder.template.unasked(talk)
        if header and whole.endswith(header):
            return Example([Piece(whole, True)], complete=True, notes=talk.notes)
        return self._example(talk, whole, [(0, len(whole))])

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


def _with_arguments_as_text(message: Message) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
