"""A prompt template of the user's own: Jinja over a row's columns, and what of its text is the answer."""

from typing import ClassVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fsdp_qlora.data.chat import CLOSES, MARK, MARKING, OPENS, as_calls
from fsdp_qlora.data.forms import ANSWERS, Form
from fsdp_qlora.data.templates import Example, Piece, Row, text_of
from fsdp_qlora.errors import BadRow, first_line


class PromptTemplate:
    """Rows -> examples through a Jinja template that sees every column by its name.

    What it puts between {% generation %} and {% endgeneration %} is learnt. Without these marks it renders the prompt,
    and the answer is the row's completion, response, answer or output.
    """

    FORM: ClassVar[Form] = Form("prompt_template", "prompt_template", {}, takes_all=True)

    def __init__(self, text: str, path: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        self.marked = MARK.search(text) is not None
        self.path = path
        self.template = environment.from_string(MARKING + as_calls(text) if self.marked else text)

    def __call__(self, row: Row, location: str) -> Example:
        """Return the row as text. Raises BadRow where the template cannot render it, or it has no answer."""
        try:
            rendered = self.template.render(**{str(key): value for key, value in row.items()})
        except Exception as error:  # a template is a program: it raises whatever it raises
            raise BadRow(f"{location}: prompt_template {self.path} does not take it ({first_line(error)})") from error
        if not self.marked:
            answer = next((column for column in ANSWERS if column in row), None)
            if answer is None:
                raise BadRow(
                    f"{location}: has no answer: mark it in {self.path} with {{% generation %}} and "
                    "{% endgeneration %} or name its column with --columns output=COLUMN; it has "
                    f"{', '.join(map(str, row))}"
                )
            return Example([Piece(rendered, False), Piece(text_of(row, answer, location), True)])
        example = Example()
        for part in rendered.split(OPENS):
            answer_text, closes, rest = part.partition(CLOSES)
            if not closes:
                answer_text, rest = "", part
            example.pieces += [Piece(answer_text, True), Piece(rest, False)]
        example.pieces = [piece for piece in example.pieces if piece.text]
        return example
