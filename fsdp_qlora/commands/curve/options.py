"""The command curve: its own options beside all of train.py's, and the rules between them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fsdp_qlora.commands.answering import AnsweringOptions
from fsdp_qlora.commands.base import Command
from fsdp_qlora.commands.evaluate import EvaluateOptions
from fsdp_qlora.config.options import REQUIRED, Config, Conflict, Needs, as_in, option
from fsdp_qlora.config.parse import beside_training
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.data.sources import NAMES, STDIN, parts_of
from fsdp_qlora.errors import UserError


@dataclass
class CurveOptions:
    """Curve: how many rows each point trains on, which rows measure it and how. All options below are train.py's."""

    rows: list[int] = option(  # noqa: RUF009 (a dataclasses.field)
        REQUIRED,
        """Rows of each point: 200,400,600. A point trains on the first so many rows of dataset, so each has the rows of
        the points before it. 0: the base without an adapter.""",
        "",
        "a run of train.py and an evaluation for each",
        unit="rows",
        at_least=0,
        known_as=("points", "sizes", "train_sizes", "n_rows"),
    )
    eval_dataset: str = option(
        REQUIRED,
        """Rows that measure all points: files, or a hub dataset with its split (id:config:split). The runs evaluate on
        them too while they train, as eval_steps says; eval_samples takes only the first.""",
        "",
        is_path=True,
        known_as=("test_dataset", "test_file", "eval_file", "validation_file", "val_dataset", "test_rows"),
    )
    output_dir: str = option(
        "curve",
        """Folder for curve.png, curve.csv and curve.json, and in it one for each point: rows-200, with adapter,
        metrics.jsonl, evaluation.json and answers.""",
        "under the current folder",
        "an adapter for each point",
        is_path=True,
    )
    overwrite_output_dir: bool = option(
        False,
        "Write into an output_dir that is not empty, and begin a curve that is there anew.",
        "an unfinished curve is gone on with all the same, and finished points are not lost by accident",
        "all folders rows-N in it are removed, each time that it is given",
    )
    gpus: int = option(
        -1,
        "GPUs of each run and each evaluation; torchrun is started for more than one. Without a GPU: processes.",
        "all that CUDA shows, and one process where it shows none",
        "a step has the rows of all ranks, so other numbers of them are other runs",
        unit="ranks",
        at_least=1,
        special={-1: "all"},
        known_as=("nproc_per_node", "num_gpus", "num_processes", "ranks"),
    )
    measures: list[str] = as_in(EvaluateOptions, "measures")  # noqa: RUF009 (a dataclasses.field)
    normalize: Literal["none", "space", "words"] = as_in(EvaluateOptions, "normalize")
    max_new_tokens: int = as_in(AnsweringOptions, "max_new_tokens")
    answer_batch_size: int = as_in(AnsweringOptions, "batch_size")


Asked = tuple[CurveOptions, Config]  # the curve's own options, and those of its runs


def run(asked: Asked) -> None:
    """Train and measure each point that is not finished; write table and picture after each."""
    from fsdp_qlora.commands.curve.points import draw_curve  # torch takes seconds to import

    draw_curve(*asked)


def _refused(name: str, broken: Any, text: str) -> Conflict[Asked]:
    return Conflict((name,), broken, text)


def _names_its_rows(dataset: str) -> bool:
    """Return whether evaluate and train.py take the same rows of it: no folder nor hub dataset without its split."""
    try:
        names = [part.name for part in parts_of(dataset)]
    except UserError:
        return True  # told when the rows are read
    return all(n in NAMES or Path(n).expanduser().is_file() or n.count(":") == 2 or _is_missing(n) for n in names)


def _is_missing(name: str) -> bool:
    return Path(name).suffix != "" and not Path(name).expanduser().exists()  # told when it is opened


def _has_shares(dataset: str) -> bool:
    try:
        return any(part.weight is not None for part in parts_of(dataset))
    except UserError:
        return False


def _base_is_known(own: CurveOptions, train: Config) -> bool:
    """Return whether evaluate, which has no options of HQQ, makes the same base without an adapter."""
    default, model = type(train.model)(model_name=""), train.model
    names = ("n_bits", "hqq_group_size", "hqq_axis", "hqq_optimize")
    is_hqq = TRAIN_TYPES[model.train_type].codec == "hqq"
    return 0 not in own.rows or not is_hqq or all(getattr(model, n) == getattr(default, n) for n in names)


CHOSEN_BY_TEST = "the rows that measure a point would choose its adapter, which flatters it; omit {}"
ALONE = "curve decides it for each run; omit it"

NEEDS: tuple[Needs[Asked], ...] = (
    Needs(
        ("max_new_tokens", "normalize", "answer_batch_size"),
        "measures",
        lambda a: bool({"auto", "exact"} & {*a[0].measures}),
        "add exact",
    ),
)
CONFLICTS: tuple[Conflict[Asked], ...] = (
    _refused("dataset_samples", lambda a: a[1].data.dataset_samples is not None, "rows says it; omit it"),
    _refused("resume", lambda a: a[1].output.resume is not None, "curve goes on by itself; omit it"),
    _refused("save_model", lambda a: not a[1].output.save_model, "the adapters are what is measured; omit it"),
    _refused("plan_only", lambda a: a[1].memory.plan_only, "curve trains; ask train.py for the plan"),
    _refused("profile", lambda a: a[1].profile.profile, "the runs would write one trace; profile train.py"),
    _refused("dummy_weights", lambda a: a[1].model.dummy_weights, "random weights answer nothing; omit it"),
    _refused("world_size", lambda a: a[1].launch.world_size != -1, "curve starts the ranks; set gpus in its place"),
    _refused("master_addr", lambda a: a[1].launch.master_addr is not None, ALONE),
    _refused("master_port", lambda a: a[1].launch.master_port is not None, ALONE),
    _refused("save_best", lambda a: a[1].evaluation.save_best, CHOSEN_BY_TEST.format("save_best")),
    _refused(
        "early_stopping_patience",
        lambda a: a[1].evaluation.early_stopping_patience is not None,
        CHOSEN_BY_TEST.format("early_stopping_patience"),
    ),
    _refused(
        "dataset",
        lambda a: _has_shares(a[1].data.dataset),
        "of shares fewer rows are not the first of more; omit the shares, or mix the rows into one file",
    ),
    _refused("dataset", lambda a: a[1].data.dataset == STDIN, "standard input is read once; give a file"),
    _refused("eval_dataset", lambda a: a[0].eval_dataset == STDIN, "standard input is read once; give a file"),
    _refused(
        "eval_dataset",
        lambda a: a[0].eval_dataset not in (STDIN, "dummy") and not _names_its_rows(a[0].eval_dataset),
        "of a folder or a hub dataset curve must know which rows; give files, or id:config:split",
    ),
    Conflict(
        ("rows", "train_type"),
        lambda a: not _base_is_known(*a),
        "evaluate makes HQQ bases without an adapter by HQQ's defaults alone; leave 0 out of rows, and measure the "
        "base with evaluate --adapter FOLDER --base_too true",
    ),
    Conflict(
        ("measures",),
        lambda a: "auto" in a[0].measures and len(a[0].measures) > 1,
        "auto includes whatever the rows allow; give auto alone, or the others without it",
    ),
)

CURVE = Command(
    "loss and accuracy by the number of training rows, with a picture",
    beside_training(
        "python -m fsdp_qlora curve --config FILE --rows 200,400,600 --eval_dataset FILE [--option value ...]",
        """Trains on the first 200, 400, 600, ... rows of a dataset and measures each adapter on the same other rows: a
        table and a picture of loss and accuracy by rows. Each point is a run of train.py and one of evaluate, whose
        command lines are printed; curve starts torchrun itself. What is finished stays: the same command goes on where
        it was interrupted, and other --rows add points.""",
        CurveOptions,
        NEEDS,
        CONFLICTS,
    ),
    run,
    interrupted="finished points stay, and the same command goes on",
)
