"""What answers are worth: which are right and how sure that is; pure arithmetic over texts and losses."""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fsdp_qlora.errors import BadRow
from fsdp_qlora.generation.likelihood import RowLoss
from fsdp_qlora.report.records import perplexity_of
from fsdp_qlora.units import count_of

Z = 1.959964  # of a 95 % interval
ARTICLES = re.compile(r"\b(a|an|the)\b")
LETTERS = string.ascii_uppercase


def _words(text: str) -> str:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
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

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.mean)

    def record(self) -> dict[str, Any]:
        """Return the figures for JSON, which has no NaN and no infinity: None stands for them."""
        half = math.nan if self.half is None else self.half
        interval = [self.mean - half, self.mean + half] if math.isfinite(self.mean) and math.isfinite(half) else None
        return {"loss": _finite(self.mean), "loss_interval": interval, "perplexity": _finite(self.perplexity),
                "label_tokens": self.labels, "loss_rows": self.rows}  # fmt: skip

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def mean_loss(rows: Sequence[RowLoss]) -> Loss:
    """Return the mean over all labels, rows taken as drawn from a larger set of them (a ratio of two sums)."""
    labels = sum(row.labels for row in rows)
    mean, count = math.fsum(row.total for row in rows) / labels, len(rows)
    if count < 2:
        return Loss(mean, labels, count, None)
    apart = math.fsum((row.total - mean * row.labels) ** 2 for row in rows)
    return Loss(mean, labels, count, Z * math.sqrt(apart * count / (count - 1)) / labels)


def choices_of(row: Mapping[str, Any], answer: str | int | None, where: str) -> tuple[list[str], int] | None:
    """Return (the choices of a row, which one is right), None of a row without choices.

    `choices` is a list of texts, or an object of lists `text` and `label`. An integer counts them from 0. A text is
    one of the choices or of their labels; where it is neither it is a number from 0, or a letter, and without labels
    these count beside the choices. Raises BadRow where it is none of these or may mean two, for an empty choice and for
    a right one that is there twice."""
    given = row.get("choices")
    if given is None:
        return None
    values, labels = _listed(given, where)
    texts = [str(value) for value in values]
    if not all(text.strip() for text in texts):
        raise BadRow(f"{where}: a choice is empty, which every model finds the likeliest")
    named = answer if answer is not None else row.get("answerKey", row.get("label", row.get("gold")))
    if isinstance(named, int) and not isinstance(named, bool):
        found = {named} if 0 <= named < len(texts) else set[int]()
        for names in (values, labels):
            found |= {i for i, name in enumerate(names[: len(texts)]) if type(name) is int and name == named}
    else:
        found = _readings("" if named is None else str(named).strip(), texts, [str(label).strip() for label in labels])
    if len(found) > 1:
        which = " or ".join(repr(texts[i]) for i in sorted(found))
        raise BadRow(f"{where}: its answer {named!r} may mean {which}; give the choice's number from 0, as an integer")
    if not found:
        raise BadRow(f"{where}: its answer {'' if named is None else named!r} is none of its {len(texts)} choices")
    right = found.pop()
    if texts.count(texts[right]) > 1:
        raise BadRow(f"{where}: its right choice {texts[right]!r} is there twice, and only one of them would count")
    return texts, right


def _listed(given: Any, where: str) -> tuple[list[Any], list[Any]]:
    """Return (the choices, their labels) of what a row has as choices. Raises BadRow where it is none of that."""
    values: Any
    labels: Any
    values, labels = (given.get("text"), given.get("label") or []) if isinstance(given, dict) else (given, [])
    for name, value in (("choices", values), ("label", labels)):
        if not isinstance(value, list | tuple) or not all(isinstance(one, str | int | float) for one in value):
            raise BadRow(f"{where}: {name} is {value!r}; give a list of texts, or an object of lists text and label")
        if any("\ud800" <= letter <= "\udfff" for one in value for letter in str(one)):
            raise BadRow(f"{where}: {name} holds half a character (a surrogate alone), which no tokenizer takes")
    if len(values) < 2:
        raise BadRow(f"{where}: has {count_of(len(values), 'choice')}, and one of two or more can be the likeliest")
    return [*values], [*labels]


def _readings(said: str, texts: Sequence[str], labels: Sequence[str]) -> set[int]:
    """Return the choices that a text may mean."""
    by_name = [[text.strip() for text in texts], list(labels[: len(texts)])]
    by_place = [[str(i) for i in range(len(texts))], list(LETTERS[: len(texts)])]
    readings = [by_name, by_place] if labels else [[*by_name, *by_place]]
    for names in readings:
        found = {some.index(said) for some in names if said in some}
        if found:
            return found
    return set()


def best(scores: Sequence[RowLoss], per_token: bool) -> int:
    """Return the choice of the least loss, as a sum or per token; of equals the first, -1 where a loss is NaN."""
    losses = [row.total / max(1, row.labels) if per_token else row.total for row in scores]
    return -1 if any(math.isnan(loss) for loss in losses) else losses.index(min(losses))


def sign_test(only_first: int, only_second: int) -> float:
    """Return how likely so unequal numbers or more unequal ones are by chance, each way as likely (two-sided)."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    ways = tail = 1  # of that many heads, and of that many or fewer; integers, which a float cannot hold from 2^1024 on
    for i in range(fewer):
        ways = ways * (count - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << count))
