"""Commands beside training: the options of each and the work that it starts."""

__all__ = ["table"]
