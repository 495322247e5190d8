"""Placements: where a block's frozen bytes live and how they reach the device that computes."""

__all__ = ["base", "cache_use", "choose", "load"]
