"""Marks of a template, `{% generation %}` and `{% endgeneration %}`: what they hold is the assistant's."""

import re
from itertools import accumulate

MARK = re.compile(r"\{%(-?|\+?)\s*(generation|endgeneration)\s*(-?|\+?)%\}")
OPENS, CLOSES = "\ue0f0", "\ue0f1"  # private characters, put around what is marked
MARKING = "{% macro marked_() %}" + OPENS + "{{ caller() }}" + CLOSES + "{% endmacro %}"


def as_calls(template: str) -> str:
    """Return a template with its marks as calls of the macro in MARKING, which puts characters around what they hold.

    Calls trim the lines that they stand in as marks do."""
    calls = {"generation": "call marked_()", "endgeneration": "endcall"}
    return MARK.sub(lambda mark: f"{{%{mark[1]} {calls[mark[2]]} {mark[3]}%}}", template)


def read_marks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """Return (the text without the characters that MARKING puts into it, what they hold of it as [start, end)).

    Marks within marks count as the outer ones alone."""
    parts = re.split(f"([{OPENS}{CLOSES}])", rendered)
    texts, marks = parts[::2], parts[1::2]
    spans, depth, start = list[tuple[int, int]](), 0, 0
    for mark, at in zip(marks, accumulate(map(len, texts)), strict=False):
        if mark == OPENS and depth == 0:
            start = at
        depth += 1 if mark == OPENS else -1
        if mark == CLOSES and depth == 0:
            spans.append((start, at))
    return "".join(texts), spans
