"""A run as its folder tells it: each file read, or why there is nothing of it."""

from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.errors import UserError
from fsdp_qlora.report.page.answers import Answered, read_eval_answers
from fsdp_qlora.report.page.environment import Part, read_parts
from fsdp_qlora.report.page.evaluation import FILE as EVALUATION
from fsdp_qlora.report.page.evaluation import Evaluated, read_evaluation
from fsdp_qlora.report.page.files import Missing
from fsdp_qlora.report.page.options import FILE as CONFIG
from fsdp_qlora.report.page.options import Chosen, read_options
from fsdp_qlora.report.page.plan import FILE as PLAN
from fsdp_qlora.report.page.plan import Plan, read_plan
from fsdp_qlora.report.page.steps import Steps, read_steps
from fsdp_qlora.report.parts import FILE as PARTS
from fsdp_qlora.report.records import ANSWERS, STEPS
from fsdp_qlora.runtime.files import taken

OF_A_RUN = (CONFIG, PLAN, STEPS, PARTS, ANSWERS, EVALUATION)  # one of them makes a folder a run's
CURVE = "curve.json"
LONGEST_NAME = 200  # letters of a model's name that are shown


@dataclass(frozen=True)
class Run:
    """What there is to show of a run."""

    folder: Path
    steps: Steps | Missing
    plan: Plan | Missing
    options: Chosen | Missing
    parts: list[Part] | Missing
    answers: Answered | Missing
    evaluation: Evaluated | Missing
    going_on: str  # on which machine, as `taken` says

    @property
    def begun(self) -> int:
        """The step after which the last part of the run began; 0 of a run that was not resumed."""
        return 0 if isinstance(self.parts, Missing) else self.parts[-1].from_step

    @property
    def name(self) -> str:
        """The model's name, without the folders of a path."""
        name = "" if isinstance(self.options, Missing) else self.options.model_name
        is_folder = name.startswith(("/", "~"))
        name = name.rstrip("/").rpartition("/")[2] if is_folder else name or self.folder.resolve().name
        return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"


def read_run(folder: Path, evaluation: Path | None = None) -> Run:
    """Read a run's folder. evaluation: the folder that evaluate wrote to; None: that folder, or `evaluation` in it.

    Raises UserError where it has none of a run's files."""
    if not folder.is_dir():
        raise UserError(f"output_dir: {folder} is no folder; give the output_dir of a run of train.py")
    if not any((folder / name).exists() for name in OF_A_RUN):
        point = ", or that of a point of this curve, as rows-200" if (folder / CURVE).exists() else ""
        raise UserError(
            f"output_dir: {folder} has none of a run's files ({', '.join(OF_A_RUN)}); give the output_dir of a run of "
            f"train.py{point}"
        )
    evaluated = evaluation or (folder if (folder / EVALUATION).exists() else folder / "evaluation")
    return Run(
        folder,
        read_steps(folder),
        read_plan(folder),
        read_options(folder),
        read_parts(folder),
        read_eval_answers(folder),
        read_evaluation(evaluated, folder),
        taken(folder),
    )
