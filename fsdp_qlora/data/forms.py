"""Forms of rows: recognised from the columns, and the columns that each form reads under its own field names."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fsdp_qlora.data.templates import Row, Template, alpaca, guanaco, prompt_completion, question_answer, text
from fsdp_qlora.errors import BadRow, UserError


@dataclass(frozen=True)
class Form:
    """A form of row. Fields map to the columns that may hold them, the first that is there is taken."""

    name: str
    option: str  # the value of dataset_format that allows it
    needs: Mapping[str, tuple[str, ...]]  # the last of them is what is learnt
    takes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # optional fields
    template: Template | None = None  # None: made with the tokenizer (messages), or with a template of the user's
    takes_all: bool = False  # every column, under its own name

    def fields(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        """Return {field: column} of a row, None if a column that it needs is not there."""
        found: dict[str, str] = {}
        for name, columns in {**self.needs, **self.takes}.items():
            column = next((column for column in columns if column in row and column not in found.values()), None)
            if column is not None:
                found[name] = column
            elif name in self.needs:
                return None
        return found

    def answers(self, row: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
        """Return the columns of a row that may be what is learnt. found: of `fields`."""
        columns = list(self.needs.values())[-1] if self.needs else ()
        return [column for column in columns if row.get(column) is not None and column not in list(found.values())[:-1]]

    @property
    def words(self) -> str:
        return f"{' + '.join(columns[0] for columns in self.needs.values())} ({self.name})"


TALK = ("messages", "conversations", "conversation")
TALK_EXTRAS = {
    "system": ("system",),
    "tools": ("tools",),
    "functions": ("functions",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
ANSWERS = ("completion", "response", "answer", "output")
PAIRS = "pairs of chosen and rejected answers, for preference training (DPO), which is not built yet"
VERDICTS = ("label", "kto_tag")  # columns of true and false, as TRL and LLaMA-Factory name them for KTO
ASKED = ("prompt_completion", "alpaca", "question_answer")  # forms of a prompt and an answer
CHAT = ("messages", "prompt_messages")  # names of the forms that go through the chat template
# In order: a row that fits several (alpaca rows often carry a ready-made `text` too) takes the first.
FORMS = (
    Form("messages", "messages", {"messages": TALK}, TALK_EXTRAS),
    Form(
        "prompt_completion",
        "prompt_completion",
        {"prompt": ("prompt",), "completion": ANSWERS},
        {},
        prompt_completion,
    ),
    Form(
        "alpaca",
        "alpaca",
        {"instruction": ("instruction",), "output": ("output", "response", "answer", "completion")},
        {"input": ("input", "context"), "system": ("system",), "history": ("history",)},
        alpaca,
    ),
    Form(
        "question_answer",
        "alpaca",
        {"question": ("question", "query"), "answer": ("answer", "response", "output", "completion")},
        {"context": ("context",)},
        question_answer,
    ),
    Form("text", "text", {"text": ("text",)}, {}, text),
)  # fmt: skip
PROMPT_MESSAGES = Form("prompt_messages", "messages", {"prompt": ("prompt",), "completion": ANSWERS}, TALK_EXTRAS)
GUANACO = Form("guanaco", "guanaco", {"text": ("text",)}, {}, guanaco)


def form_of(row: Mapping[str, Any], dataset_format: str, dataset: str, named: Collection[str] = ()) -> Form:
    """Return the form of a dataset from its first row, among those `dataset_format` allows ('auto': all).

    named: the fields that --columns names. Raises UserError naming the columns there are and the columns that would do,
    for a row that has a prompt and an answer of several forms, and for rows of preference training.
    """
    allowed = [form for form in FORMS if dataset_format in ("auto", form.option)]
    if dataset_format == "auto":
        _refuse_pairs(row, dataset)
    fitting = [(form, fields) for form in allowed if (fields := form.fields(row)) is not None]
    fitting = [(form, fields) for form, fields in fitting if set(named) <= set(fields.values())] or fitting
    if fitting:
        form = fitting[0][0]
        if form.name in ASKED:  # a prompt of one may hold the answer of another
            _refuse_several([(form, fields) for form, fields in fitting if form.name in ASKED], dataset)
        return PROMPT_MESSAGES if form.name == "prompt_completion" and isinstance(row["prompt"], list) else form
    wanted = "; or ".join(form.words for form in allowed)
    raise UserError(
        f"dataset {dataset!r}: dataset_format {dataset_format!r} does not fit its columns "
        f"{', '.join(map(str, row)) or '(none)'}; wanted: {wanted}; --columns FIELD=COLUMN,... names others"
    )


def _refuse_several(fitting: list[tuple[Form, dict[str, str]]], dataset: str) -> None:
    if len(fitting) > 1:
        readings = [f"{' + '.join(fields[name] for name in form.needs)} ({form.name})" for form, fields in fitting]
        form, fields = fitting[-1]
        named = ",".join(f"{name}={fields[name]}" for name in form.needs)
        raise UserError(
            f"dataset {dataset!r}: its rows may be {' or '.join(readings)}; say which with --dataset_format or "
            f"--columns, as --columns {named}"
        )


def _refuse_pairs(row: Mapping[str, Any], dataset: str) -> None:
    """Refuse rows that hold a better and a worse answer: neither is to be learnt as if it were alone."""
    if "chosen" in row and "rejected" in row:
        to = "--columns prompt=prompt,completion=chosen" if isinstance(row["chosen"], str) and "prompt" in row else ""
        to = to or ("--columns messages=chosen" if isinstance(row["chosen"], list) else "--columns text=chosen")
        to = "put each behind its messages" if isinstance(row["chosen"], dict) else to
        raise UserError(f"dataset {dataset!r}: has {PAIRS}; to learn the chosen ones alone, {to}")


def refuse_verdicts(row: Mapping[str, Any], form: Form, dataset: str) -> None:
    """Refuse rows that say whether their answer is wanted: those that are not must not be learnt as if they were."""
    verdict = _verdict(row)
    if verdict is not None and form.name != "text":
        raise UserError(
            f"dataset {dataset!r}: its {verdict} column says which answers are wanted, for preference training (KTO), "
            f"which is not built yet; keep the wanted rows alone and take {verdict} away, or name the form with "
            "--dataset_format where it means something else"
        )


def _verdict(row: Mapping[str, Any]) -> str | None:
    """Return the column of true and false, or of these words as CSV has them, by which an answer is wanted or not."""

    def says(value: Any) -> bool:
        return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))

    return next((name for name in VERDICTS if says(row.get(name))), None)


def _refuse_preference(row: Row, form: Form, location: str) -> None:
    verdict = _verdict(row) if form.name != "text" else None
    if verdict is not None or ("chosen" in row and "rejected" in row):
        what = f"has the column {verdict} of true and false" if verdict else f"has {PAIRS}"
        raise BadRow(f"{location}: {what}, unlike the first row; mend the row, or name the form with --dataset_format")


class Columns:
    """Rows under field names: columns that --columns names first, the rest as the form finds them."""

    def __init__(self, form: Form, named: Mapping[str, str], wary: bool = False):
        """Read rows of a form. wary: refuse a later row that shows preference training, as the first one would be."""
        self.form, self.named, self.wary = form, named, wary
        self.seen: set[str] = set()
        self.used: set[str] = set(named.values())

    def fields(self, row: Row, location: str) -> Row:
        """Return the row's values by field; where a needed one is missing, the row as it is: its template says which.

        Raises BadRow where a column that the user has named is not there, or is none of this form's, and where several
        columns may be what is learnt.
        """
        self.seen.update(map(str, row))
        named = renamed(row, self.named, location)
        if self.form.takes_all:
            self.used.update(map(str, row))
            return named
        if self.wary:
            _refuse_preference(named, self.form, location)
        found = self.form.fields(named)
        if found is None:
            return named
        answers = self.form.answers(named, found)
        if len(answers) > 1 and not set(answers) & set(self.named):
            field = list(self.form.needs)[-1]
            raise BadRow(
                f"{location}: what is to be learnt may be in {' or '.join(answers)}; name its column with --columns "
                f"{field}={answers[0]}"
            )
        if idle := self.named.keys() - found.values():
            field = next(name for name in self.named if name in idle)
            raise BadRow(
                f"{location}: columns: {field}={self.named[field]} has no effect on rows of the form {self.form.name}, "
                f"whose fields are taken from {', '.join(found.values())}; omit it"
            )
        self.used.update(column for name, column in found.items() if name not in self.named)
        return {name: named[column] for name, column in found.items()}

    @property
    def unused(self) -> list[str]:
        """Return the columns that no field took, of all rows so far."""
        return sorted(self.seen - self.used)


def renamed(row: Row, named: Mapping[str, str], location: str) -> Row:
    """Return the row with the columns of `named` ({field: column}) under their fields' names."""
    if not named:
        return row
    for name, column in named.items():
        if column not in row:
            raise BadRow(f"{location}: columns: {name}={column}, but the row has only {', '.join(map(str, row))}")
    rest = {column: value for column, value in row.items() if column not in named.values()}
    return rest | {name: row[column] for name, column in named.items()}
