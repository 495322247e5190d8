"""Frozen weights: where they are read from, how they are encoded, and the bytes that a block holds."""

__all__ = ["checkpoint_files", "codecs", "frozen_bytes", "sources"]
