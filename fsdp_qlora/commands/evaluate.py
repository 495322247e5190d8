"""The command evaluate: loss and accuracy of a model on a file of rows, with its adapter and without."""

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.commands.answering import CONFLICTS, NEEDS, AnsweringOptions
from fsdp_qlora.commands.base import Command, ready_for_hub
from fsdp_qlora.config.options import Conflict, DataOptions, Needs, as_in, command, option

MEASURES = ("loss", "exact", "choice")


@dataclass
class EvaluateOptions(AnsweringOptions):
    """Evaluate: what is measured, on which rows, and where the figures go."""

    measures: list[str] = option(  # noqa: RUF009 (a dataclasses.field)
        ["auto"],
        """What is measured. loss: cross-entropy and perplexity of the rows' answers, as in training. exact: greedy
        answers that are the row's own. choice: rows with `choices` whose right one the model finds the likeliest. auto:
        loss, and of the others what every row has the columns for.""",
        "all that the rows allow",
        "loss and choice are a pass over the rows; exact one more for each new token",
        choices=("auto", *MEASURES),
        known_as=("metrics", "tasks"),
    )
    normalize: Literal["none", "space", "words"] = option(
        "space",
        """What of an answer counts in exact. none: every character. space: words with a single space between them.
        words: lower case as well, without punctuation and the articles a, an, the, as SQuAD compares.""",
        "space at the ends says nothing about an answer",
        known_as=("normalization", "normalisation"),
    )
    context_length: int = as_in(DataOptions, "context_length")
    base_too: bool = option(
        True,
        "Measure the base without the adapter as well.",
        "it shows what the adapter brings",
        "twice the time",
        known_as=("compare_base", "baseline"),
    )
    show_answers: int = option(
        1,
        "Print the answers to so many of the first rows.",
        "one shows whether the answers are what they should be",
        unit="rows",
        at_least=0,
    )
    at_least: float | None = option(
        None,
        "End with exit code 1 if a smaller share of the rows is exactly right (with the adapter, if there is one).",
        "to measure is the usual wish",
        at_least=0,
        at_most=1,
    )
    output_dir: str = option(
        "evaluation",
        "Folder for evaluation.json and, with exact, the answers: answers.jsonl and answers_base.jsonl.",
        "in the current folder",
        is_path=True,
    )
    overwrite_output_dir: bool = option(
        False,
        "Replace the files of an earlier evaluation.",
        "earlier figures are not lost by accident",
    )


def run(asked: EvaluateOptions) -> None:
    """Measure, write the figures and print them as a table."""
    ready_for_hub(asked.adapter or "", asked.model_name)
    from fsdp_qlora.commands.evaluate_rows import evaluate_rows  # torch takes seconds to import

    evaluate_rows(asked)


def _has_exact(asked: EvaluateOptions) -> bool:
    return bool({"auto", "exact"} & {*asked.measures})


EVALUATE = Command(
    "loss and accuracy on rows, with an adapter and without",
    command(
        "python -m fsdp_qlora evaluate --adapter FOLDER --dataset FILE [--option value ...]",
        """Measures a model and its adapter on rows with answers: loss and perplexity, how many answers are exactly
        right, how often the right one of several choices is the likeliest, each with a 95 % interval. Under `torchrun
        --nproc_per_node GPUS -m fsdp_qlora evaluate ...` the rows are divided among the GPUs.""",
        EvaluateOptions,
        (
            *NEEDS,
            Needs[EvaluateOptions](
                ("max_new_tokens", "batch_size", "normalize", "show_answers", "at_least"),
                "measures",
                _has_exact,
                "add exact",
            ),
            Needs[EvaluateOptions](
                ("context_length",), "measures", lambda a: bool({"auto", "loss"} & {*a.measures}), "add loss"
            ),
            Needs[EvaluateOptions](
                ("base_too",), "adapter", lambda a: a.adapter is not None, "set adapter to the adapter's folder"
            ),
        ),
        (
            *CONFLICTS,
            Conflict[EvaluateOptions](
                ("measures",),
                lambda a: "auto" in a.measures and len(a.measures) > 1,
                "auto includes whatever the rows allow; give auto alone, or the others without it",
            ),
        ),
    ),
    run,
    interrupted="nothing is written before all is measured; the same command starts anew",
    ranks=True,
)
