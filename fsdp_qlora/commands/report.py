"""The command report: a run's folder as one page of HTML."""

from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.commands.base import Command
from fsdp_qlora.config.options import command, option
from fsdp_qlora.errors import UserError
from fsdp_qlora.runtime.files import writing_to


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
        "null: report.html in output_dir",
        is_path=True,
        known_as=("out_file", "html", "report_file"),
    )
    evaluation_dir: str | None = option(
        None,
        "Folder that `evaluate` wrote its figures and answers to.",
        "null: output_dir, or `evaluation` in it",
        is_path=True,
        known_as=("evaluation", "eval_dir"),
    )


def run(asked: ReportOptions) -> None:
    """Write the page and print its name."""
    from fsdp_qlora.report.page import REPORT, is_report, write_report  # numpy takes a moment to import

    folder = Path(asked.output_dir)
    file = folder / REPORT if asked.output_file is None else Path(asked.output_file)
    option_name = "output_dir" if asked.output_file is None else "output_file"
    evaluation = None if asked.evaluation_dir is None else Path(asked.evaluation_dir)
    if evaluation is not None and not evaluation.is_dir():
        raise UserError(f"evaluation_dir: {evaluation} is no folder; give the output_dir of evaluate")
    if not folder.is_dir():
        raise UserError(f"output_dir: {folder} is no folder; give the output_dir of a run of train.py")
    with writing_to(file.parent, option_name):
        if file.exists() and not is_report(file):
            raise UserError(f"{option_name}: {file} exists and is no report; choose another output_file")
        write_report(folder, file, evaluation)
    print(f"saved   {file}")


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
