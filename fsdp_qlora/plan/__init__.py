"""The plan: where bytes live and what blocks keep for backward, for the fastest step that fits."""

__all__ = ["budget", "expected", "inputs", "placements", "plan", "planning", "rates"]
