"""Loggers that live outside this package: each is imported only when `log_to` names it, and never holds a step up."""

from fsdp_qlora.report.loggers.table import LOGGERS, check_installed, open_loggers

__all__ = ["LOGGERS", "check_installed", "open_loggers"]
