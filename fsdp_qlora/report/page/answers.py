"""Answers before and after: to held-out rows while training, and of evaluate with the adapter and without."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.report.page.files import Lines, Missing, count, unreadable
from fsdp_qlora.report.page.html import Html, join, paragraph, passage, section, text
from fsdp_qlora.report.records import ANSWERS

MOST_ROWS = 30  # that are shown of a file


@dataclass(frozen=True)
class Asked:
    """A row that was asked. said: (who answered, what) in the order in which they are shown. right: by who answered."""

    row: int
    prompt: str
    expected: str | None
    said: tuple[tuple[str, str], ...]
    right: Mapping[str, bool]


@dataclass
class Answered:
    """Rows with their answers, and what there is to say of the file that they are of."""

    rows: list[Asked]
    more: int  # rows that are not shown
    note: str


def read_eval_answers(folder: Path) -> Answered | Missing:
    """Read the answers of the first and of the last evaluation of a run to the same rows."""
    lines = Lines(folder / ANSWERS)
    first: dict[int, dict[str, Any]] = {}
    last: dict[int, dict[str, Any]] = {}
    others = set[int]()
    try:
        for line in _answers(lines):
            row = line["row"]
            if count(line.get("step")) is None:
                lines.damaged += 1
            elif row in first or len(first) < MOST_ROWS:
                first.setdefault(row, line)
                last[row] = line
            else:
                others.add(row)
    except FileNotFoundError:
        return Missing(
            f"{ANSWERS} is not in the folder: no held-out row was asked. --eval_generate 3 asks three after each "
            "evaluation."
        )
    except OSError as error:
        return unreadable(lines.file, error)
    return Answered([_before_and_after(first[row], last[row]) for row in first], len(others), lines.note)


def answers_section(answered: Answered | Missing) -> Html:
    """Return answers to held-out rows at the first and the last evaluation side by side."""
    return section("answers", "Answers before and after", *answered_rows(answered, ANSWERS))


def answered_rows(answered: Answered | Missing, source: str) -> list[Html]:
    """Return a card for each row that was asked."""
    if isinstance(answered, Missing):
        return [paragraph(answered.why)]
    if not answered.rows:
        return [paragraph(f"{source} has no answers yet. {answered.note}".strip())]
    cards = [_card(asked, source) for asked in answered.rows]
    more = f"{answered.more:,} more rows are in {source}. " if answered.more else ""
    return [*cards, *([paragraph(f"{more}{answered.note}".strip(), "note")] if more or answered.note else [])]


def _before_and_after(first: Mapping[str, Any], last: Mapping[str, Any]) -> Asked:
    said = [(f"step {first['step']:,}", str(first["answer"]))]
    if last["step"] != first["step"]:
        said.append((f"step {last['step']:,}", str(last["answer"])))
    return Asked(first["row"], str(last.get("prompt", "")), _expected(last), tuple(said), {})


def read_evaluate_answers(folder: Path, names: Mapping[str, str]) -> Answered:
    """Read the first answers of evaluate's files, which have the same rows in the same order. names: who answered ->
    the file."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    notes, total = [], 0
    for who, name in names.items():
        lines, rows, n_answers = Lines(folder / name), dict[int, dict[str, Any]](), 0
        try:
            for line in _answers(lines):
                n_answers += 1
                if len(rows) < MOST_ROWS:
                    rows[line["row"]] = line
        except OSError as error:
            notes.append(unreadable(lines.file, error).why)
        found[who], total = rows, max(total, n_answers)
        notes.append(lines.note)
    asked = dict.fromkeys(row for rows in found.values() for row in rows)
    shown = [_side_by_side(row, found) for row in list(asked)[:MOST_ROWS]]
    return Answered(shown, max(0, total - len(shown)), " ".join(note for note in notes if note))


def _side_by_side(row: int, found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Asked:
    lines = {who: rows[row] for who, rows in found.items() if row in rows}
    one = next(iter(lines.values()))
    said = tuple((who, str(line["answer"])) for who, line in lines.items())
    right = {who: line["right"] for who, line in lines.items() if isinstance(line.get("right"), bool)}
    return Asked(row, str(one.get("prompt", "")), _expected(one), said, right)


def _answers(lines: Lines) -> Iterator[dict[str, Any]]:
    """Yield the lines that are answers; others count as damaged."""
    for line in lines:
        if count(line.get("row")) is not None and "answer" in line:
            yield line
        else:
            lines.damaged += 1


def _expected(line: Mapping[str, Any]) -> str | None:
    return None if line.get("expected") is None else str(line["expected"])


def _card(asked: Asked, source: str) -> Html:
    answers = [_answer(who, said, asked.right.get(who), source) for who, said in asked.said]
    expected = [] if asked.expected is None else [Html("<h4>expected</h4>"), passage(asked.expected, source)]
    return join(
        [
            Html(f'<article class="asked"><h3>row {asked.row:,}</h3><h4>asked</h4>'),
            passage(asked.prompt, source),
            *expected,
            Html(f'<div class="pair">{join(answers)}</div></article>'),
        ]
    )


def _answer(who: str, said: str, right: bool | None, source: str) -> Html:
    kind, word = ("right", "right") if right else ("alarm", "not right")
    mark = "" if right is None else f' <span class="{kind}">{word}</span>'
    return Html(f"<div><h4>{text(who)}{mark}</h4>{passage(said, source)}</div>")
