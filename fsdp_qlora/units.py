"""Units of measurement."""

GIB = 2**30  # bytes


def as_gib(nbytes: float, digits: int = 1) -> str:
    """Return bytes as a text in GiB with so many decimals: `22.9 GiB`."""
    return f"{nbytes / GIB:.{digits}f} GiB"
