"""The loggers that live outside this package, TensorBoard and wandb: imported here alone, and only when asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fsdp_qlora.config.options import Config
from fsdp_qlora.errors import UserError
from fsdp_qlora.runtime.libraries import installed


class Logger(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...

    @property
    def place(self) -> str:
        """Location of what was logged, for the user."""


class LoggerSpec(NamedTuple):
    """What `log_to` can name."""

    open: Callable[[Config], Logger]  # starts it, on one rank; raises UserError where it cannot
    package: str | None = None  # that must be installed


def check_installed(config: Config) -> None:
    """Raise UserError when `log_to` names a logger that is not installed: the same on every rank of a machine."""
    for name, logger in LOGGERS.items():
        if name in config.output.log_to and logger.package is not None and not installed(logger.package):
            raise UserError(
                f"log_to: {name} was asked for but is not installed: run `pip install {logger.package}`, or leave "
                f"{name} out of log_to"
            )


def open_loggers(config: Config) -> list[Logger]:
    """Start the loggers that `log_to` names, on one rank. Raises UserError when one cannot start."""
    check_installed(config)
    return [logger.open(config) for name, logger in LOGGERS.items() if name in config.output.log_to]


class TensorBoard:
    def __init__(self, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = Path(config.output.output_dir) / "tensorboard"
        self._writer = SummaryWriter(str(directory))
        self.place = f"{directory} (tensorboard --logdir {directory})"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, config: Config) -> None:
        import wandb

        options = config.output
        try:
            self._run: Any = wandb.init(
                project=options.project_name,
                name=options.name,
                group=options.group,
                entity=options.entity,
                config=config.to_flat(),
                dir=options.output_dir,
            )
        except wandb.Error as error:
            raise UserError(
                f"log_to: wandb could not start ({error}): run `wandb login`, set WANDB_MODE=offline, or leave wandb "
                "out of log_to"
            ) from error
        self.place = self._run.url or self._run.dir

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


# name in `log_to` -> logger, in the order in which they are started
LOGGERS: dict[str, LoggerSpec] = {
    "tensorboard": LoggerSpec(TensorBoard, "tensorboard"),
    "wandb": LoggerSpec(Wandb, "wandb"),
}
