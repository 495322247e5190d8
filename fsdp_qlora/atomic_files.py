"""Files written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path in the same folder to write to; once the block ends, its file is on disk and replaces `target`.

    An old file stays until the new one is complete. Where the block raises, or the disk, nothing is left behind.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that only their owner can read
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
