"""The options of the group output: files, loggers and texts of a run."""

from dataclasses import dataclass

from fsdp_qlora.config.log_targets import LOG_TARGETS, meanings
from fsdp_qlora.config.option import option


@dataclass
class OutputOptions:
    """Output: what is left behind and what is shown."""

    output_dir: str = option(
        "output",
        """Folder for the adapter in PEFT's format, the tokenizer, config.yaml, plan.json, environment.json,
        metrics.jsonl, loss.png and report.html.""",
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
    save_steps: int | None = option(
        None,
        """Write a checkpoint, from which the run can go on to the same bits, after each so many optimizer steps, and at
        the end and when a signal ends the run: output_dir/checkpoint-STEP, which PEFT opens too. A file named SAVE in
        output_dir makes one after the step, with or without this option.""",
        "a checkpoint stops training while it is written",
        "12 bytes per adapter parameter with the Adams: 10 GB at 70B and rank 64, at the disk's speed",
        unit="optimizer steps",
        at_least=1,
        known_as=("checkpoint_every", "checkpointing_steps"),
    )
    save_total_limit: int | None = option(
        None,
        """Most checkpoints to keep: the oldest is removed once a newer one is whole. That of the lowest evaluation loss
        stays in any case.""",
        "null keeps all",
        "one more is on the disk while the newest is written",
        unit="checkpoints",
        at_least=1,
    )
    resume: str | None = option(
        None,
        """Go on from a checkpoint. auto: from the newest whole one in output_dir, or from the start where there is none
        yet, so that one command line starts a run and restarts it. A path: from that one.""",
        "null starts anew",
        "reading it, and its checksums: 10 GB at 70B and rank 64",
        is_path=True,
        known_as=("resume_from_checkpoint", "auto_resume", "restart_from"),
    )
    report: bool = option(
        True,
        """Write report.html at the end, also on Ctrl-C and after an error: curves, memory, plan, options and answers of
        the run on one page.""",
        """a run is looked at without another command; `python -m fsdp_qlora report` writes the same page at any time,
        of a run that is still going too""",
        "a file of about 100 KB with the answers to held-out rows in it, and a second for 100,000 steps",
        known_as=("html_report", "write_report"),
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

    @property
    def makes_checkpoints(self) -> bool:
        """Whether the run writes checkpoints without being asked for each: after steps, at its end, on a signal."""
        return self.save_steps is not None or self.resume is not None
