"""Frozen weights: where they are read from, how they are encoded, and the bytes that a block holds."""

__all__ = ["base_cache", "checkpoint_files", "choose", "codecs", "frozen_bytes", "hub", "layout", "source"]
