"""Levels of what a fused block saves for backward, and their names in the options."""

from enum import IntEnum


class Keep(IntEnum):
    """Keep levels. Each saves what the level before it saves and more; the comments count numbers per token.

    H hidden, N query heads, K key/value heads, D head dim, I intermediate. Where norms follow o and down (Gemma 2, 3)
    or their adapters have magnitudes (DoRA), down's output is saved at each level as well [H]; from HALVES on, o's
    output [H] is saved in place of the MLP half's input, which is made of it. The adapters' x A^T, R numbers each,
    hardly count."""

    INPUT = 0  # the block's input [H]
    HALVES = 1  # + the MLP half's input [H]
    ATTENTION = 2  # + attention's output and row sums [N*D + N]
    QKV = 3  # + queries, keys and values [(N + 2K)*D]
    ALL = 4  # + gate and up [2I]

    @property
    def label(self) -> str:
        """Return the level's name in options and records."""
        return self.name.lower()

    @classmethod
    def named(cls, label: str) -> "Keep":
        """Return the level that options and records call `label`."""
        return cls[label.upper()]
