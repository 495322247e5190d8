"""The command report: a run's folder as one page of HTML."""

import os
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.commands.base import Command
from fsdp_qlora.config.options import command, option
from fsdp_qlora.errors import UserError


@dataclass
class ReportOptions:
    """Report: of which run, and where the page goes."""

    output_dir: str = option(
        "output",
        "Folder of a run of train.py: finished, still going on, or a point of a curve (curve/rows-200).",
        "where runs write",
        is_path=True,
        known_as=("run_dir", "run", "folder", "adapter", "logging_dir"),
    )
    output_file: str | None = option(
        None,
        "File of the page. An earlier report is replaced.",
        "report.html in output_dir",
        is_path=True,
        known_as=("out_file", "html", "report_file"),
    )
    evaluation_dir: str | None = option(
        None,
        "Folder that `evaluate` wrote its figures and answers to.",
        "output_dir, or `evaluation` in it",
        is_path=True,
        known_as=("evaluation", "eval_dir"),
    )


def run(asked: ReportOptions) -> None:
    """Write the page and print its name."""
    from fsdp_qlora.report.page import REPORT, make_page, write_page  # numpy takes a moment to import

    folder = Path(asked.output_dir)
    evaluation = None if asked.evaluation_dir is None else Path(asked.evaluation_dir)
    if evaluation is not None:
        _check_folder("evaluation_dir", evaluation, "evaluate")
    _check_folder("output_dir", folder, "a run of train.py")
    page = make_page(folder, evaluation)
    file = folder / REPORT if asked.output_file is None else Path(asked.output_file)
    try:
        _check_replaceable(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, file)
    except OSError as error:
        raise UserError(
            f"output_file: {file} cannot be written ({error.strerror}); give one that can, as /tmp/report.html"
        ) from error
    print(f"saved   {file}")


def _check_folder(option: str, folder: Path, of: str) -> None:
    """Raise UserError where there is no folder, or none that this user may enter."""
    try:
        os.stat(os.path.join(folder, os.curdir))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{option}: {folder} is no folder; give the output_dir of {of}") from None
    except OSError as error:
        raise UserError(f"{option}: {folder} cannot be read ({error.strerror}); give one that this user can") from error


def _check_replaceable(file: Path) -> None:
    """Raise UserError where something else than an earlier report is there. Raises OSError."""
    from fsdp_qlora.report.page import is_report

    if file.exists() and not (file.is_file() and is_report(file)):
        raise UserError(f"output_file: {file} exists and is no report; choose another output_file")


REPORT_COMMAND = Command(
    "a run's folder as one page: curves, memory, plan, answers, options",
    command(
        "python -m fsdp_qlora report [--output_dir FOLDER] [--output_file FILE]",
        """Writes one HTML page on a run: loss and speed over steps, memory that was planned and measured, what was
        where, answers before and after, options that are not the defaults, time, and what it ran on. The page fetches
        nothing and has no script. It is made of the files in the folder, also while the run goes on.""",
        ReportOptions,
    ),
    run,
    interrupted="nothing was written",
)
