"""The table of what `log_to` can name, and which options each of them reads."""

from dataclasses import dataclass

RUN = ("project_name", "name", "group")


@dataclass(frozen=True)
class LogTarget:
    """One name of `log_to`."""

    meaning: str
    reads: tuple[str, ...] = ()  # options that have an effect there


# The loggers among these are started by report.loggers.table.LOGGERS.
LOG_TARGETS: dict[str, LogTarget] = {
    "tqdm": LogTarget("a progress bar"),
    "stdout": LogTarget("one line a step"),
    "wandb": LogTarget("Weights & Biases", (*RUN, "entity")),
    "tensorboard": LogTarget("event files in output_dir"),
    "trackio": LogTarget("a database on this machine, or a Space of the hub", RUN),
    "mlflow": LogTarget("MLFLOW_TRACKING_URI, or mlflow.db in the current folder", RUN),
    "swanlab": LogTarget("SwanLab", (*RUN, "entity")),
}


def readers(option: str) -> list[str]:
    """Return the names of `log_to` that read an option."""
    return [name for name, target in LOG_TARGETS.items() if option in target.reads]


def meanings() -> str:
    """Return what each name stands for, in words."""
    return " ".join(f"{name}: {target.meaning}." for name, target in LOG_TARGETS.items())
