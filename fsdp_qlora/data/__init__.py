"""Rows: where they come from, what of them is learnt, and the batches that each rank takes."""

__all__ = ["batches", "collate", "show_rows", "sources"]
