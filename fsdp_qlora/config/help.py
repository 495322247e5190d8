"""The options as text: `--help` for a terminal, and docs/options.md (`python -m fsdp_qlora.config.help` prints it)."""

import shutil
import textwrap
from typing import Any

from fsdp_qlora.config.option import REQUIRED, Option, show
from fsdp_qlora.config.parse import TRAIN
from fsdp_qlora.config.program import Program

FORM = """Names may be written with underscores or hyphens; --option=value works too; an option of true or false given
alone means true; the items of a list are separated by commas or spaces. --config reads the same names from a YAML or
JSON file, written flat; flags go over the file. An option that could have no effect in the run is refused, as is a name
that does not exist; all mistakes are shown together, before anything is loaded."""


def help_text(width: int | None = None, program: Program[Any] = TRAIN) -> str:
    """Return all options of a program by group, wrapped to `width` columns (the terminal's, within 50 and 110)."""
    width = width or min(max(shutil.get_terminal_size((100, 24)).columns, 50), 110)
    lines = [f"usage: {program.usage}", "", *_wrap(f"{program.intro} {FORM}", width), ""]
    lines += [
        "  -h, --help",
        "      Show this and stop.",
        "  --config FILE",
        "      Read options from a YAML or JSON file.",
    ]
    for group, kind in program.groups.items():
        lines += ["", *_wrap(_title(kind), width)]
        for option in _options(program, group):
            head = f"--{option.name} {_metavar(option)}  ({_facts(option)})"
            lines += _wrap(head, width, "  ", " " * 8)
            for text in (option.spec.meaning, _reasons(option)):
                lines += _wrap(text, width, " " * 6, " " * 6)
    return "\n".join(lines)


def markdown() -> str:
    """Return the contents of docs/options.md."""
    intro = f"{TRAIN.intro} {FORM}"
    parts = [
        "# Options",
        "<!-- Written by `python -m fsdp_qlora.config.help > docs/options.md`; "
        "the source is fsdp_qlora/config/groups/. -->",
        f"`{TRAIN.usage}`",
        " ".join(intro.replace("--config", "`--config`").replace("--option=value", "`--option=value`").split()),
    ]
    for group, kind in TRAIN.groups.items():
        parts.append(f"## {_title(kind).rstrip('.')}")
        options = _options(TRAIN, group)
        parts += [f"**`{o.name}`** ({_facts(o)}): {o.spec.meaning} {_reasons(o)}".rstrip() for o in options]
    return "\n\n".join(part.replace("hybrid_*", "`hybrid_*`") for part in parts)


def _wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    text = " ".join(text.split())
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _options(program: Program[Any], group: str) -> list[Option]:
    return [option for option in program.options.values() if option.group == group]


def _title(kind: type) -> str:
    return (kind.__doc__ or "").strip()


def _metavar(option: Option) -> str:
    return {str: "TEXT", int: "N", float: "X", bool: "BOOL"}[option.kind] + (",..." if option.many else "")


def _facts(option: Option) -> str:
    """Return `default 512; a whole number of tokens, at least 2`."""
    default = "required" if option.default is REQUIRED else f"default {show(option.default)}"
    return f"{default}; {option.allowed()}"


def _reasons(option: Option) -> str:
    spec = option.spec
    why = f"Why {show(option.default)}: {spec.why}." if spec.why else ""
    price = f"Price: {spec.price}." if spec.price else ""
    return f"{why} {price}".strip()


if __name__ == "__main__":
    print(markdown())
