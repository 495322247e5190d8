"""The page of a run: report.html, made of the files that the run has left in its folder so far."""

from fsdp_qlora.report.page.write import REPORT, is_report, make_page, write_page, write_report

__all__ = ["REPORT", "is_report", "make_page", "write_page", "write_report"]
