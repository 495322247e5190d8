"""Optimizers over float32 slices: each rank owns a part of all master weights and of their state."""

__all__ = ["adapter_group", "optimizer_state", "optimizers", "schedules", "sharded_adapters"]
