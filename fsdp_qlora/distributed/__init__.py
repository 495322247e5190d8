"""The ranks of a run: their process group, what signals ask of them, and how many hold one copy of the base."""

__all__ = ["alike", "interrupt", "shards", "shared_folder", "world"]
