"""Frozen weights: where they are read from, how they are encoded, and the bytes that a block holds."""

__all__ = ["checkpoint_files", "choose", "codecs", "dummy", "frozen_bytes", "hub", "layout", "source"]
