"""A prompt template of the user's own: Jinja over a row's columns, and what of its text is the answer."""

import json
from collections.abc import Collection
from typing import ClassVar

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fsdp_qlora.data.forms import ANSWERS, Form
from fsdp_qlora.data.marks import CLOSES, MARK, MARKING, OPENS, as_calls, read_marks
from fsdp_qlora.data.templates import Example, Piece, Row, text_of
from fsdp_qlora.errors import BadRow, first_line


class PromptTemplate:
    """Rows -> examples through a Jinja template that sees every column by its name.

    What it puts between {% generation %} and {% endgeneration %} is learnt. Without these marks it renders the prompt,
    and the answer is the row's completion, response, answer or output.
    """

    FORM: ClassVar[Form] = Form("prompt_template", "prompt_template", {}, takes_all=True)

    def __init__(self, text: str, path: str, named: Collection[str]):
        """Compile the template. named: the fields that --columns names, among which the answer is looked for first."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        self.marked = MARK.search(text) is not None
        self.path, self.named = path, named
        self.template = environment.from_string(MARKING + as_calls(text) if self.marked else text)
        self.shown = set() if self.marked else jinja2.meta.find_undeclared_variables(environment.parse(text))

    def __call__(self, row: Row, location: str) -> Example:
        """Return the row as text. Raises BadRow where the template cannot render it, or its answer is not certain."""
        try:
            rendered = self.template.render(**{str(key): value for key, value in row.items()})
        except Exception as error:  # a template is a program: it raises whatever it raises
            raise BadRow(f"{location}: prompt_template {self.path} does not take it ({first_line(error)})") from error
        if not self.marked:
            return Example([Piece(rendered, False), Piece(text_of(row, self._answer(row, location), location), True)])
        held = json.dumps(row, ensure_ascii=False, default=str)
        if OPENS in held or CLOSES in held:
            raise BadRow(f"{location}: holds the character {OPENS!r} or {CLOSES!r}, by which what is learnt is marked")
        text, spans = read_marks(rendered)
        example, done = Example(), 0
        for start, end in spans:
            example.pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
            done = end
        example.pieces = [piece for piece in [*example.pieces, Piece(text[done:], False)] if piece.text]
        return example

    def _answer(self, row: Row, location: str) -> str:
        """Return the column that is the row's answer. Raises BadRow where that is not certain."""
        columns = [column for column in ANSWERS if column in row]
        columns = [column for column in columns if column in self.named] or columns
        marks = f"mark it in {self.path} with {{% generation %}} and {{% endgeneration %}}"
        if not columns:
            raise BadRow(
                f"{location}: has no answer: {marks} or name its column with --columns output=COLUMN; it has "
                f"{', '.join(map(str, row))}"
            )
        if len(columns) > 1:
            raise BadRow(
                f"{location}: may have its answer in {' or '.join(columns)}: {marks} or name its column with --columns "
                f"{columns[0]}={columns[0]}"
            )
        if columns[0] in self.shown:
            raise BadRow(
                f"{location}: {self.path} shows the answer {columns[0]!r} already, behind which it would come again: "
                f"{marks}"
            )
        return columns[0]
