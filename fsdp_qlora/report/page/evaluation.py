"""What evaluate measured of the adapter: its figures with their intervals, and its answers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.report.page.answers import Answered, answered_rows, read_evaluate_answers
from fsdp_qlora.report.page.files import Missing, damaged, loss_text, number, numbers, read_json
from fsdp_qlora.report.page.html import Html, code, paragraph, section, table, text
from fsdp_qlora.report.page.public import public

FILE, ANSWERS, BASE_ANSWERS = "evaluation.json", "answers.jsonl", "answers_base.jsonl"
ADAPTER_FILE = "adapter_model.safetensors"
STATES = {"base": "without the adapter", "adapter": "with it"}
MEASURES = {"exact": "exactly right", "choice": "choices right", "choice_per_token": "choices right, per token"}


@dataclass(frozen=True)
class Evaluated:
    """An evaluation.json. states: "base", "adapter" or both -> measure -> figure. answers: where exact was measured."""

    about: str
    states: dict[str, dict[str, str]]
    compared: str
    answers: Answered | None
    is_older: bool  # than the adapter


def read_evaluation(folder: Path, run: Path) -> Evaluated | Missing:
    """Read what evaluate left in a folder. run: the folder of the adapter."""
    file = folder / FILE
    record = read_json(file)
    if isinstance(record, Missing):
        return record
    try:
        states = {name: _figures(record[name]) for name in STATES if name in record}
        about = public(f"{record['rows']} rows of {record['dataset']}")
        compared = _compared(record["exact_compared"]) if "exact_compared" in record else ""
    except (KeyError, TypeError, AttributeError):
        return damaged(file)
    both = {STATES["base"]: BASE_ANSWERS, STATES["adapter"]: ANSWERS}
    names = both if len(states) == len(both) else {STATES[name]: ANSWERS for name in states}
    answers = read_evaluate_answers(folder, names) if (folder / ANSWERS).exists() else None
    return Evaluated(about, states, compared, answers, _is_older(file, run / ADAPTER_FILE))


def evaluation_section(found: Evaluated | Missing) -> Html:
    """Return a table of measures with a column for each state, and the answers of each."""
    title = "Evaluation of the adapter"
    if isinstance(found, Missing):
        remedy = Html(f"{text(found.why)} {code('python -m fsdp_qlora evaluate')} measures an adapter.")
        return section("evaluation", title, Html(f"<p>{remedy}</p>"))
    head = ("measure", *(STATES[name] for name in found.states))
    measures = dict.fromkeys(measure for figures in found.states.values() for measure in figures)
    rows = [
        (text(measure), *(text(figures.get(measure, "")) for figures in found.states.values())) for measure in measures
    ]
    parts = [paragraph(f"Measured on {found.about}. Intervals are of 95 %."), table(title, head, rows)]
    if found.is_older:
        older = f"{FILE} is older than the adapter in this folder: it may be of an earlier one."
        parts.insert(0, paragraph(older, "alarm"))
    if found.compared:
        parts.append(paragraph(found.compared))
    if found.answers is not None:
        parts += answered_rows(found.answers, ANSWERS)
    return section("evaluation", title, *parts)


def _figures(state: Mapping[str, Any]) -> dict[str, str]:
    """Return measure -> its figure, in words."""
    found = {}
    loss, interval = number(state.get("loss")), numbers(state.get("loss_interval"))
    if math.isfinite(loss):
        between = f" ({loss_text(interval[0])} to {loss_text(interval[1])})" if len(interval) == 2 else ""
        found["loss"] = loss_text(loss) + between
        perplexity = number(state.get("perplexity"))
        found["perplexity"] = f"{perplexity:,.3f}" if perplexity < 1e6 else f"{perplexity:.4g}"
    for name, said in MEASURES.items():
        if name in state:
            found[said] = _share(state[name])
    return found


def _share(share: Mapping[str, Any]) -> str:
    said = f"{share['right']} of {share['rows']}, {number(share['share']):.1%}"
    interval = numbers(share.get("interval"))
    return said + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if len(interval) == 2 else "")


def _compared(pair: Mapping[str, Any]) -> str:
    return (
        f"Rows that only the adapter answers right: {pair['only_adapter']}; only the base: {pair['only_base']}. So "
        f"unequal numbers come by chance with a probability of {number(pair['p']):.2g} (sign test)."
    )


def _is_older(file: Path, than: Path) -> bool:
    try:
        return file.stat().st_mtime < than.stat().st_mtime
    except OSError:
        return False
