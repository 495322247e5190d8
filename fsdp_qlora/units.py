"""Units of measurement, and numbers with their words."""

GIB = 2**30  # bytes


def as_gib(nbytes: float, digits: int = 1) -> str:
    """Return bytes as a text in GiB with so many decimals: `22.9 GiB`."""
    return f"{nbytes / GIB:.{digits}f} GiB"


def count_of(number: int, what: str) -> str:
    """Return a number with its word: `1 row`, `1,000 rows`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def as_time(seconds: float) -> str:
    """Return seconds as a clock shows them: 7 -> 0:07, 3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
