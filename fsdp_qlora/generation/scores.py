"""What answers are worth: which are right and how sure that is; pure arithmetic over texts and losses."""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fsdp_qlora.errors import BadRow
from fsdp_qlora.generation.likelihood import RowLoss

Z = 1.959964  # of a 95 % interval
ARTICLES = re.compile(r"\b(a|an|the)\b")
LETTERS = string.ascii_uppercase


def _words(text: str) -> str:
    bare = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return " ".join(ARTICLES.sub(" ", bare).split())


# By --normalize: what of an answer counts.
NORMALIZE: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "space": lambda text: " ".join(text.split()),
    "words": _words,
}


class Share(NamedTuple):
    """So many of so many rows, with the 95 % interval of the share (Wilson's, which holds at 0 and 1 too)."""

    right: int
    rows: int

    @property
    def share(self) -> float:
        return self.right / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        n, p = self.rows, self.share
        middle, width = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return max(0.0, (middle - width) / (1 + Z * Z / n)), min(1.0, (middle + width) / (1 + Z * Z / n))

    def record(self) -> dict[str, Any]:
        return {"right": self.right, "rows": self.rows, "share": self.share, "interval": list(self.interval)}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right} of {self.rows}, {self.share:.1%} ({low:.1%} to {high:.1%})"


class Loss(NamedTuple):
    """The mean loss of label tokens, with the half of its 95 % interval over rows (None of a single row)."""

    mean: float
    labels: int
    rows: int
    half: float | None

    def record(self) -> dict[str, Any]:
        interval = None if self.half is None else [self.mean - self.half, self.mean + self.half]
        return {"loss": self.mean, "loss_interval": interval, "perplexity": math.exp(self.mean),
                "label_tokens": self.labels, "loss_rows": self.rows}  # fmt: skip

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def mean_loss(rows: Sequence[RowLoss]) -> Loss:
    """Return the mean over all labels, rows taken as drawn from a larger set of them (a ratio of two sums)."""
    labels = sum(row.labels for row in rows)
    mean, count = math.fsum(row.total for row in rows) / labels, len(rows)
    if count < 2:
        return Loss(mean, labels, count, None)
    apart = math.fsum((row.total - mean * row.labels) ** 2 for row in rows)
    return Loss(mean, labels, count, Z * math.sqrt(apart * count / (count - 1)) / labels)


def choices_of(row: Mapping[str, Any], answer: str | None, where: str) -> tuple[list[str], int] | None:
    """Return (the choices of a row, which one is right), None of a row without choices.

    `choices` is a list of texts, or an object of lists `text` and `label`. The answer is one of the texts, a label, a
    number counted from 0, or a letter. Raises BadRow where it is none of these."""
    given = row.get("choices")
    if given is None:
        return None
    labels = [str(label) for label in given.get("label", [])] if isinstance(given, dict) else []
    texts = [str(text) for text in (given.get("text", []) if isinstance(given, dict) else given)]
    named = answer if answer is not None else row.get("answerKey", row.get("label", row.get("gold")))
    said = "" if named is None else str(named).strip()
    numbered = [str(i) for i in range(len(texts))]
    for names in (texts, labels, numbered, list(LETTERS[: len(texts)])):
        if said in names[: len(texts)]:
            return texts, names.index(said)
    raise BadRow(f"{where}: its answer {said!r} is none of its {len(texts)} choices")


def best(scores: Sequence[RowLoss], per_token: bool) -> int:
    """Return the choice of the least loss, as a sum or per token; of equals the first."""
    losses = [row.total / max(1, row.labels) if per_token else row.total for row in scores]
    return losses.index(min(losses))


def sign_test(only_first: int, only_second: int) -> float:
    """Return how likely so unequal numbers or more unequal ones are by chance, each way as likely (two-sided)."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, i) for i in range(fewer + 1)) / float(2**count)
    return min(1.0, 2 * tail)
