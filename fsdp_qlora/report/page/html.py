"""Text as HTML: whatever is in it, it stays text, and what has no letter of its own is shown by its number."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import NewType

Html = NewType("Html", str)  # markup; all else goes through `text`

# What a browser drops, replaces or draws as nothing: controls but for tab and newline, those that turn the direction
# of the letters behind them, halves of surrogate pairs, numbers that are no characters.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
SHOWN = 500  # characters of a long text that are seen before it is opened
LONG = 700  # characters, or newlines below, from which on a text is closed
LONG_LINES = 16
MOST = 200_000  # characters of one text that are taken into the page


def text(value: object) -> Html:
    """Return a text, or what `str` makes of something else, as HTML."""
    seen = UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value).replace("\r\n", "\n"))
    return Html(html.escape(seen, quote=True))


def join(parts: Iterable[Html], between: str = "\n") -> Html:
    return Html(between.join(parts))


def paragraph(said: object, kind: str = "") -> Html:
    """Return a paragraph of text. kind: its class in the style sheet."""
    return Html(f"<p{_class(kind)}>{text(said)}</p>")


def code(said: object) -> Html:
    return Html(f"<code>{text(said)}</code>")


def passage(said: str, source: str) -> Html:
    """Return what a model was asked or said, its spaces and lines kept, written in whichever direction it is.

    A long one is closed until it is clicked. source: the file that has the rest of one that is longer than MOST."""
    if not said:
        return paragraph("(empty)", "note")
    whole, left = _said("div", "said", text(said[:MOST])), len(said) - MOST
    if left > 0:
        whole = join([whole, paragraph(f"{left:,} more characters are in {source}.", "note")])
    if len(said) <= LONG and said.count("\n") < LONG_LINES:
        return whole
    start = _said("span", "said start", text("\n".join(said[:SHOWN].split("\n")[:LONG_LINES]) + " …"))
    more = f'<span class="open">{len(said):,} characters</span>'
    return Html(f'<details class="long"><summary>{start} {more}</summary>{whole}</details>')


def table(title: str, head: Sequence[object], rows: Iterable[Sequence[Html]], numbers: Sequence[int] = ()) -> Html:
    """Return a table that scrolls inside its box; the first cell of a row names it.

    title: for who cannot see it. numbers: columns that are set to the right."""
    kinds = [_class("number" if i in numbers else "") for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{text(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = [
        f'<tr><th scope="row"{kinds[0]}>{first}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        + "</tr>"
        for first, *rest in rows
    ]
    body = "\n".join(lines)
    return Html(
        f'<div class="scroll" role="region" aria-label="{text(title)}" tabindex="0"><table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def section(name: str, title: str, *parts: Html) -> Html:
    """Return a part of the page under a heading. name: its anchor."""
    return Html(f'<section id="{name}">\n<h2>{text(title)}</h2>\n{join(parts)}\n</section>')


def _said(tag: str, kind: str, said: Html) -> Html:
    return Html(f'<{tag} class="{kind}" dir="auto">{said}</{tag}>')


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
