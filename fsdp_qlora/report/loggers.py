"""The loggers that live outside this package, TensorBoard and wandb: imported here alone, and only when asked for."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fsdp_qlora.config.options import Config
from fsdp_qlora.errors import UserError

INSTALL = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb"}


class Logger(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...

    @property
    def place(self) -> str:
        """Where a person finds what was logged."""


def check_installed(config: Config) -> None:
    """Raises UserError when `log_to` names a logger that is not installed: the same on every rank of a machine."""
    for name, command in INSTALL.items():
        if name in config.output.log_to and not _installed(name):
            raise UserError(
                f"log_to: {name} was asked for but is not installed: run `{command}`, or leave {name} out of log_to"
            )


def open_loggers(config: Config) -> list[Logger]:
    """The loggers that `log_to` names, started; to be called on one rank. Raises UserError when one cannot start."""
    check_installed(config)
    loggers: list[Logger] = []
    if "tensorboard" in config.output.log_to:
        loggers.append(TensorBoard(Path(config.output.output_dir) / "tensorboard"))
    if "wandb" in config.output.log_to:
        loggers.append(Wandb(config))
    return loggers


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # without an origin it is a mere folder, as wandb leaves behind


class TensorBoard:
    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

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
