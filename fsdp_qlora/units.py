"""Units of measurement, and numbers with their words."""

GIB = 2**30  # bytes


def as_gib(nbytes: float, digits: int = 1) -> str:
    """Return bytes as a text in GiB with so many decimals: `22.9 GiB`."""
    return f"{nbytes / GIB:.{digits}f} GiB"


def count_of(number: int, what: str) -> str:
    """Return a number with its word: `1 row`, `1,000 rows`."""
    return f"{number:,} {what}{'s' * (number != 1)}"
