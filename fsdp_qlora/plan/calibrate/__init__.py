"""Rates of this machine, measured on the shapes of the run and kept for the next start."""

__all__ = ["rates"]
