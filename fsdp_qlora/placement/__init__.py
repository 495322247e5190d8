"""Placements: where a block's frozen bytes live and how they reach the device that computes."""

__all__ = ["base", "choose", "load"]
