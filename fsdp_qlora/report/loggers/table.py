"""The table of loggers, and how those that `log_to` names are started."""

from collections.abc import Callable

from fsdp_qlora.config.options import Config
from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.report.loggers.base import LoggerSpec
from fsdp_qlora.report.loggers.behind import Behind
from fsdp_qlora.report.loggers.mlflow import Mlflow
from fsdp_qlora.report.loggers.swanlab import Swanlab
from fsdp_qlora.report.loggers.tensorboard import TensorBoard
from fsdp_qlora.report.loggers.trackio import Trackio
from fsdp_qlora.report.loggers.wandb import Wandb
from fsdp_qlora.runtime.libraries import installed

# name in `log_to` -> logger, in the order in which they are started
LOGGERS: dict[str, LoggerSpec] = {
    "tensorboard": LoggerSpec(TensorBoard, "tensorboard"),
    "trackio": LoggerSpec(Trackio, "trackio", "check TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL"),
    "mlflow": LoggerSpec(Mlflow, "mlflow", "check MLFLOW_TRACKING_URI"),
    "swanlab": LoggerSpec(Swanlab, "swanlab", "run `swanlab login`, set SWANLAB_MODE=offline"),
    "wandb": LoggerSpec(Wandb, "wandb", "run `wandb login`, set WANDB_MODE=offline"),
}


def check_installed(config: Config) -> None:
    """Raise UserError when `log_to` names a logger that is not installed: the same on every rank of a machine."""
    for name, logger in LOGGERS.items():
        if name in config.output.log_to and logger.package is not None and not installed(logger.package):
            raise UserError(
                f"log_to: {name} was asked for but is not installed: run `pip install {logger.package}`, or leave "
                f"{name} out of log_to"
            )


def open_loggers(config: Config, say: Callable[[str], None]) -> list[Behind]:
    """Start the loggers that `log_to` names, on one rank. Raises UserError, with none left open, when one cannot."""
    check_installed(config)
    opened: list[Behind] = []
    for name, spec in LOGGERS.items():
        if name not in config.output.log_to:
            continue
        try:
            opened.append(Behind(name, spec.open(config), say))
        except Exception as error:  # each library raises kinds of its own where it has no account, network or disk
            for logger in opened:
                logger.close(failed=True)
            raise UserError(
                f"log_to: {name} could not start ({first_line(error)}): {spec.remedy}, or leave {name} out of log_to"
            ) from error
    return opened
