"""The options of the group output: files, loggers and texts of a run."""

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.config.option import option


@dataclass
class OutputOptions:
    """Output: what is left behind and what is shown."""

    output_dir: str = option(
        "output",
        "Folder for the adapter in PEFT's format, the tokenizer, config.yaml, metrics.jsonl and loss.png.",
        "under the current folder",
        "adapters take 2 or 4 bytes a parameter",
        is_path=True,
    )
    overwrite_output_dir: bool = option(
        False,
        "Write into an output_dir that is not empty.",
        "an earlier adapter is not lost by accident",
        "files of the same name are replaced",
    )
    save_model: bool = option(
        True,
        "Save the adapter and tokenizer at the end, and on Ctrl-C.",
        "training is not lost by forgetting a flag (fsdp_qlora's was false)",
        "disk space of the adapter",
    )
    log_to: list[Literal["tqdm", "stdout", "wandb", "tensorboard"]] = option(  # noqa: RUF009 (a dataclasses.field)
        ["tqdm"],
        """Where progress goes, besides metrics.jsonl. tqdm: a progress bar. stdout: one line a step. wandb,
        tensorboard: those loggers, which must be installed. Commas or spaces separate several.""",
        "it needs no account and leaves no files",
        "wandb needs a network, or WANDB_MODE=offline",
        known_as=("report_to", "logger", "log_with"),
    )
    project_name: str = option(
        "fsdp_qlora",
        "Project in wandb.",
        "the program's name",
        known_as=("wandb_project",),
    )
    name: str | None = option(None, "Run name in wandb.", "wandb makes one up", known_as=("run_name", "wandb_name"))
    group: str | None = option(None, "Run group in wandb.", "most runs belong to none", known_as=("wandb_group",))
    entity: str | None = option(None, "User or team in wandb.", "the account's own", known_as=("wandb_entity",))
    verbose: bool = option(
        False,
        "Print more at start: cards, versions, rates measured of the machine, seconds until the first step by stage.",
        "the short version is enough to see that all is well",
    )
