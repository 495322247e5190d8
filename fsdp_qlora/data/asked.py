"""Prompts to be answered: from rows of every form, with or without answers, and from lines of plain text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.columns import read_columns
from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data.chat import ChatTemplate, choose_chat_template, read_template
from fsdp_qlora.data.forms import ANSWERS, CHAT, Columns, Form, form_of, renamed
from fsdp_qlora.data.json_files import parse_line
from fsdp_qlora.data.packed import PACKED, WRONG, Placed, open_bytes
from fsdp_qlora.data.prompts import PromptTemplate
from fsdp_qlora.data.sources import STDIN, keep_stdin, open_source, parts_of
from fsdp_qlora.data.templates import Example, Row
from fsdp_qlora.data.tokens import Encoder
from fsdp_qlora.errors import BadRow, UserError
from fsdp_qlora.units import count_of

TEXT = ".txt"  # a file of it: a line is a prompt, a user's turn where the model has a chat template
BLANK = "output"  # the column that stands in for an answer that a row does not have


@dataclass(frozen=True)
class Prompt:
    """What is asked. answer: the row's own, None where it has none. row: as it was read, for who looks for more.
    index: of the row among all that were read, bad ones included, from 0. number: the answer, where the row has an
    integer for it."""

    ids: list[int]
    text: str
    answer: str | None
    location: str
    row: Mapping[str, Any]
    index: int
    number: int | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run and the tokens at which an answer to them ends. notes: lines for the user."""

    prompts: list[Prompt]
    form: str
    stops: list[int]
    notes: list[str]


def read_prompts(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    check: Callable[[Prompt], None] = lambda prompt: None,
) -> Prompts:
    """Read the rows of `options` as prompts. check: raises BadRow for one that is of no use here.

    Raises UserError and BadRow as `load_rows` does, and for a row that is no prompt."""
    choose_chat_template(tokenizer, options.chat_template)
    reader = _Reader(options, tokenizer)
    prompts, bad = list[Prompt](), list[str]()
    for index, (location, raw) in enumerate(_rows(options, tokenizer)):
        where = f"dataset {options.dataset!r}: {location}"
        try:
            prompt = reader.prompt(parse_line(where, raw), where, index)
            check(prompt)
        except BadRow as error:
            if options.bad_rows != "skip":
                raise
            bad.append(str(error))
            continue
        prompts.append(prompt)
        if options.dataset_samples is not None and len(prompts) == options.dataset_samples:
            break
    if not prompts:
        raise UserError(f"dataset {options.dataset!r}: has no rows{f'; the first bad one: {bad[0]}' if bad else ''}")
    most = max(token for prompt in prompts for token in prompt.ids)
    if most >= vocab_size:
        raise UserError(
            f"the tokenizer makes token {most}, but the model has {vocab_size} embeddings: they do not match"
        )
    notes = [f"{count_of(len(bad), 'bad row')} left out (the first: {bad[0]})"] if bad else []
    assert reader.form is not None
    return Prompts(prompts, reader.form.name, reader.stops(), notes)


def continuations(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: str = "", form: str = ""
) -> list[list[int]]:
    """Return the ids of texts that each follow the prompt of a row of this form, as an answer's are in training."""
    encoder = Encoder(tokenizer, False)
    return [encoder.continuation(text, prompt if form in CHAT else "") for text in texts]


def stop_ids(options: DataOptions, form: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return EOS, and the token that ends a turn where rows of this form (`Rows.form`) are chats."""
    choose_chat_template(tokenizer, options.chat_template)
    is_chat = any(name in CHAT for name in form.split(" + "))
    return _stops(tokenizer, ChatTemplate(tokenizer, options.dataset) if is_chat else None)


def _stops(tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None) -> list[int]:
    words = chat.end_tokens() if chat is not None else []
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *map(int, tokenizer.convert_tokens_to_ids(words))]))


class _Reader:
    """Rows -> prompts; the first row says which form all have."""

    def __init__(self, options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.tokenizer, self.encoder = options, tokenizer, Encoder(tokenizer, False)
        self.named = read_columns(options.columns or [])
        self.form: Form | None = None
        self.chat: ChatTemplate | None = None
        self.own: PromptTemplate | None = None

    def prompt(self, row: Row, where: str, index: int) -> Prompt:
        """Return what a row asks. Raises BadRow where it asks nothing."""
        columns = [column for name, column in self.named.items() if column in row or name not in ANSWERS]
        named = {name: column for name, column in self.named.items() if column in columns}
        fields = renamed(row, named, where)
        has_answer = any(column in fields for column in ANSWERS)
        if isinstance(fields.get("prompt"), list) and not has_answer:
            fields = {**fields, "messages": fields["prompt"]}
        if not has_answer:
            fields = {**fields, BLANK: ""}
        if self.form is None:
            self._begin(fields)
        assert self.form is not None
        learnt = (*ANSWERS, "messages")  # of which --columns may have named one of several
        chosen = {name: name for name in self.named if name in learnt and name in fields}
        given = Columns(self.form, chosen).fields(fields, where)
        example, answer = self.chat.prompt(given, where) if self.chat is not None else self._apart(given, where)
        text = "".join(piece.text for piece in example.pieces)
        try:
            (text + (answer or "")).encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{where}: holds half a character (a surrogate alone), which no tokenizer takes") from error
        ids = self.encoder.prompt(example) if text else []
        if not ids:
            raise BadRow(f"{where}: asks nothing: its prompt is empty")
        answer = answer if has_answer or self.chat is not None else None
        numbers = (fields[name] for name in ANSWERS if type(fields.get(name)) is int)
        return Prompt(ids, text, answer, where, row, index, next((n for n in numbers if str(n) == answer), None))

    def stops(self) -> list[int]:
        """Return EOS, and of chats the token that ends a turn."""
        return _stops(self.tokenizer, self.chat)

    def _begin(self, row: Row) -> None:
        options = self.options
        if options.prompt_template is not None:
            text = read_template(options.prompt_template, "prompt_template")
            self.own = PromptTemplate(text, options.prompt_template, self.named)
            self.form = PromptTemplate.FORM
            return
        self.form = form_of(row, options.dataset_format, options.dataset, set(self.named) & set(row))
        if self.form.name in CHAT:
            self.chat = ChatTemplate(self.tokenizer, options.dataset)
        elif options.chat_template is not None:
            raise UserError(
                f"chat_template {options.chat_template}: has no effect on rows of the form {self.form.name}; omit it"
            )

    def _apart(self, row: Row, where: str) -> tuple[Example, str | None]:
        """Return (what comes before a row's last answer, that answer). Text as a whole is to be continued."""
        assert self.form is not None
        template = self.own or self.form.template
        assert template is not None
        example = template(row, where)
        if self.form.name == "text":
            return example, None
        last = max((i for i, piece in enumerate(example.pieces) if piece.is_answer), default=len(example.pieces))
        answer = example.pieces[last].text if last < len(example.pieces) else None
        return Example(example.pieces[:last], example.complete), answer


def _rows(options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> Iterator[Placed]:
    """Yield the rows of all datasets."""
    parts = parts_of(options.dataset)
    if any(part.weight is not None for part in parts):
        raise UserError(f"dataset {options.dataset!r}: weights have no effect where every row is read; omit them")
    for part in parts:
        lines = _text_file(part.name)
        if lines is not None:
            yield from _lines(lines, bool(tokenizer.chat_template) and options.dataset_format in ("auto", "messages"))
        else:
            yield from open_source(part.name, None).rows


def _text_file(name: str) -> Path | None:
    """Return the file of a dataset that is lines of text: by its name, or what comes by standard input and is no
    JSON."""
    if name != STDIN:
        path = Path(name).expanduser()
        suffixes = [suffix.lower() for suffix in path.suffixes]
        kind = suffixes[:-1] if suffixes and suffixes[-1] in PACKED else suffixes
        return path if kind[-1:] == [TEXT] and path.is_file() else None
    path = keep_stdin()
    with path.open("rb") as file:
        first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return None if first in (b"{", b"[", b"") else path


def _lines(path: Path, as_chat: bool) -> Iterator[Placed]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip("\r\n") if line.strip() else ""
            except UnicodeDecodeError as error:
                why = f"is not UTF-8 text ({error.reason} at byte {error.start} of the line)"
                yield f"line {number}", {WRONG: why}
                continue
            if text:
                row: Row = {"messages": [{"role": "user", "content": text}]} if as_chat else {"prompt": text}
                yield f"line {number}", row
