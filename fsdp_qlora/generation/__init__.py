"""Answers of a placed model: its tokens one by one, over keys and values that are kept."""

__all__ = ["answers"]
