"""The options of a run that are not the defaults, each with its default."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.config.files import read_file
from fsdp_qlora.config.options import OPTIONS, REQUIRED, show
from fsdp_qlora.report.page.files import Missing, unreadable
from fsdp_qlora.report.page.html import LONG, MOST, Html, code, paragraph, passage, section, table, text
from fsdp_qlora.report.page.public import HIDDEN, NAMES, public, public_options

FILE = "config.yaml"


@dataclass(frozen=True)
class Changed:
    """An option with its value and its default, as a user writes them."""

    name: str
    value: str
    default: str


@dataclass(frozen=True)
class Chosen:
    """The options of a config.yaml, as `public` has them. changed: those that are not the defaults. whole: the file's
    text."""

    model_name: str
    changed: list[Changed]
    unknown: list[str]
    whole: str


def read_options(folder: Path) -> Chosen | Missing:
    """Read a run's config.yaml. An option of another version of this program is no mistake here."""
    file = folder / FILE
    if not file.exists():
        return Missing(f"{FILE} is not in the folder.")
    try:
        whole = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return unreadable(file, error)
    given, mistakes = read_file(str(file))
    if mistakes:
        return Missing(public(f"{FILE} is damaged: {mistakes[0].removeprefix(f'--config {file}: ')}."))
    values = {one.name: one.raw for one in given}
    changed = [one for name, raw in values.items() if name in OPTIONS and (one := _changed(name, raw)) is not None]
    unknown = [name for name in values if name not in OPTIONS]
    return Chosen(public(_shown(values.get("model_name"))), changed, unknown, public_options(whole))


def options_section(chosen: Chosen | Missing) -> Html:
    """Return a table of what was chosen, and the whole file."""
    title = "Options that differ from the defaults"
    if isinstance(chosen, Missing):
        return section("options", title, paragraph(chosen.why))
    rows = [(code(one.name), _cell(one.value), text(one.default)) for one in chosen.changed]
    parts = [table(title, ("option", "this run", "default"), rows) if rows else paragraph("All are the defaults.")]
    if chosen.unknown:
        parts.append(paragraph(f"This version of the program has no {', '.join(chosen.unknown)}."))
    whole, left = text(chosen.whole[:MOST]), len(chosen.whole) - MOST
    parts.append(Html(f"<details><summary>{FILE}, whole</summary><pre>{whole}</pre></details>"))
    if left > 0:
        parts.append(paragraph(f"{left:,} more characters are in {FILE}.", "note"))
    return section("options", title, *parts)


def _cell(value: str) -> Html:
    return text(value) if len(value) <= LONG else passage(value, FILE)


def _changed(name: str, raw: Any) -> Changed | None:
    """Return the option, where it is not its default."""
    option = OPTIONS[name]
    try:
        value = option.read(raw)
    except ValueError:  # not allowed now
        return Changed(name, _public(name, _shown(raw)), show(option.default))
    if value == option.default:
        return None
    return Changed(
        name, _public(name, show(value)), "none: it is required" if option.default is REQUIRED else show(option.default)
    )


def _public(name: str, value: str) -> str:
    return HIDDEN if name in NAMES else public(value)


def _shown(raw: Any) -> str:
    return "" if raw is None else ", ".join(map(str, raw)) if isinstance(raw, list) else str(raw)
