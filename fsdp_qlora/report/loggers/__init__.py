"""Loggers that live outside this package: each is imported only when `log_to` names it, and never holds a step up."""
