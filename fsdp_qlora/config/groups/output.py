"""The options of the group output: files, loggers and texts of a run."""

from dataclasses import dataclass

from fsdp_qlora.config.log_targets import LOG_TARGETS, meanings
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
    log_to: list[str] = option(  # noqa: RUF009 (a dataclasses.field)
        ["tqdm"],
        f"""Where progress goes, besides metrics.jsonl. {meanings()} Commas or spaces separate several.""",
        "it needs no account and leaves no files",
        """the package of that name must be installed; wandb and swanlab need a network and an account, or
        WANDB_MODE=offline and SWANLAB_MODE=offline""",
        choices=tuple(LOG_TARGETS),
        known_as=("report_to", "logger", "log_with"),
    )
    project_name: str = option(
        "fsdp_qlora",
        "Project in wandb, trackio and swanlab, experiment in mlflow.",
        "the program's name",
        known_as=("wandb_project", "experiment_name"),
    )
    name: str | None = option(
        None,
        "Run name in wandb, trackio, mlflow and swanlab.",
        "each makes one up",
        known_as=("run_name", "wandb_name"),
    )
    group: str | None = option(
        None,
        "Run group in wandb, trackio and swanlab, the tag group in mlflow.",
        "most runs belong to none",
        known_as=("wandb_group",),
    )
    entity: str | None = option(
        None,
        "User or team in wandb, workspace in swanlab.",
        "the account's own",
        known_as=("wandb_entity", "workspace"),
    )
    verbose: bool = option(
        False,
        "Print more at start: cards, versions, rates measured of the machine, seconds until the first step by stage.",
        "the short version is enough to see that all is well",
    )
