"""Optimizers over float32 slices: each rank owns a part of all master copies and of their state."""

__all__ = ["optimizers", "sharded_adapters"]
