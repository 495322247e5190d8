"""TensorBoard: event files in the run's folder."""

from collections.abc import Mapping
from pathlib import Path

from fsdp_qlora.config.options import Config
from fsdp_qlora.report.loggers.base import as_texts


class TensorBoard:
    def __init__(self, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = Path(config.output.output_dir) / "tensorboard"
        self._writer = SummaryWriter(str(directory))
        rows = "".join(f"| {name} | {value} |\n" for name, value in as_texts(config).items())
        self._writer.add_text("config", f"| option | value |\n|---|---|\n{rows}")
        self.place = f"{directory} (tensorboard --logdir {directory})"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()
