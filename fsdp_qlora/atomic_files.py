"""Files, and lines of files, written whole or not at all."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def append_lines(target: Path, lines: str) -> None:
    """Append lines. Where the disk takes a part of them, no part of a line is left. Raises OSError where it does."""
    data = lines.encode()
    with target.open("ab", buffering=0) as file:
        end, written = file.seek(0, os.SEEK_END), 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(end + data.rfind(b"\n", 0, written) + 1)
            raise


def sweep(folder: Path, is_ours: Callable[[str], bool], dead_only: bool) -> None:
    """Remove the parts of files that killed processes have left in `folder`.

    is_ours: of a target's name. dead_only: only of processes that are gone; else of all, where the folder is taken."""
    for part in folder.glob(".*"):
        found = re.fullmatch(r"\.(.+)\.(\d+)", part.name)
        if found and is_ours(found[1]) and not (dead_only and _is_alive(int(found[2]))):
            with suppress(OSError):
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's
    return True
