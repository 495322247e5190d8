"""Rows: where they come from, what of them is learnt, and the batches that each rank takes."""

__all__ = [
    "asked",
    "batches",
    "evaluation_batches",
    "held_out",
    "packing",
    "row_lengths",
    "show_rows",
    "sources",
]
