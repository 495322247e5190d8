"""The page put together, and written whole or not at all."""

from pathlib import Path

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.report.page.answers import answers_section
from fsdp_qlora.report.page.blocks import blocks_section
from fsdp_qlora.report.page.charts import loss_section
from fsdp_qlora.report.page.environment import environment_section
from fsdp_qlora.report.page.evaluation import evaluation_section
from fsdp_qlora.report.page.files import Missing
from fsdp_qlora.report.page.head import header
from fsdp_qlora.report.page.html import Html, join, paragraph, section, text
from fsdp_qlora.report.page.memory import memory_section
from fsdp_qlora.report.page.options import options_section
from fsdp_qlora.report.page.pace import time_section, unrecorded
from fsdp_qlora.report.page.run import Run, read_run
from fsdp_qlora.report.page.style import STYLE

REPORT = "report.html"
MARK = '<meta name="generator" content="fsdp_qlora report">'
# Nothing is fetched and nothing runs, whatever a row of data has tried to put into the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(folder: Path, evaluation: Path | None = None) -> Path:
    """Write the page of the run in a folder to `report.html` in it; return that file.

    evaluation: as for `make_page`. Raises as `make_page` and `write_page` do."""
    file = folder / REPORT
    write_page(make_page(folder, evaluation), file)
    return file


def make_page(folder: Path, evaluation: Path | None = None) -> Html:
    """Return the page of the run in a folder. evaluation: the folder that evaluate wrote to.

    Raises UserError where the folder has no run, OSError where it cannot be looked into."""
    return page_of(read_run(folder, evaluation))


def write_page(page: Html, file: Path) -> None:
    """Write a page, whole or not at all. Raises OSError: then an old file stays as it is."""
    with atomic_file(file) as part:
        part.write_text(page, encoding="utf-8")


def is_report(file: Path) -> bool:
    """Return whether a file is a page that `write_report` wrote. Raises OSError."""
    with file.open("rb") as opened:
        return MARK.encode() in opened.read(1000)


def page_of(run: Run) -> Html:
    """Return the whole page."""
    steps, unseen = run.steps, unrecorded(run.steps, run.parts)
    parts = [
        header(run),
        *([paragraph(unseen, "alarm")] if unseen else []),
        section("loss", "Loss", paragraph(steps.why)) if isinstance(steps, Missing) else loss_section(steps),
        time_section(steps, run.plan, run.parts, run.going_on),
        memory_section(run.plan, steps, run.begun),
        blocks_section(run.plan),
        answers_section(run.answers),
        evaluation_section(run.evaluation),
        options_section(run.options),
        environment_section(run.parts),
    ]
    if not isinstance(steps, Missing) and steps.note:
        parts.append(paragraph(steps.note, "note"))
    return Html(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(run.name)}: report of a run</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{join(parts)}\n</main>\n</body>\n</html>\n"
    )
