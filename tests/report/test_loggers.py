"""Loggers that options can name and loggers that can be started are the same."""

from fsdp_qlora.config.options import OPTIONS
from fsdp_qlora.report.loggers import LOGGERS


def test_log_to_names_every_logger_of_the_table():
    assert set(OPTIONS["log_to"].choices) == {"tqdm", "stdout", *LOGGERS}
