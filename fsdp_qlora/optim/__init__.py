"""Optimizers over float32 slices: each rank owns a part of all master weights and of their state."""

__all__ = ["optimizers", "schedules", "sharded_adapters"]
