"""A file that is being written: it has a name of its own until it is whole, and a lock as long as its writer lives.

Others tell by the lock what a killed run has left. A lock may hold on one host alone (a network mount), so the host is
in the name: what another host's run has begun is left alone for a day.
"""

import fcntl
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from fsdp_qlora.weights.base_cache.names import PART

ABANDONED = 86400  # seconds after which a part is nobody's, where that cannot be told
ATTEMPTS = 10  # to make a part that nobody takes away


def make_part(folder: Path) -> tuple[Path, int]:
    """Make a file to write to, locked; return its path and descriptor. Raises OSError."""
    for _ in range(ATTEMPTS):
        path = folder / f"{PART}{_host()}-{os.getpid()}-{secrets.token_hex(8)}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for a sweep at most, which holds it for a moment
        if is_still(path, file):
            return path, file
        os.close(file)  # swept away before it was locked
    raise FileNotFoundError(f"{folder}: another program removes the files that are begun there")


def is_still(path: Path, file: int) -> bool:
    """Return whether an open file has that name."""
    with suppress(OSError):
        found, own = os.stat(path), os.fstat(file)
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)
    return False


def sweep(folder: Path) -> None:
    """Remove what killed runs have left of files in `folder`: parts of this host that nobody holds a lock on, and
    others after a day."""
    for part in folder.glob(f"{PART}*"):
        with suppress(OSError):
            is_old = part.stat().st_mtime < time.time() - ABANDONED
            if is_old or _host_of(part.name) == _host():
                _remove_unlocked(part, is_old)


def _remove_unlocked(part: Path, is_old: bool) -> None:
    file = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_nobodys = True
    except BlockingIOError:  # its writer lives
        is_nobodys = False
    except OSError:  # a file system without locks
        is_nobodys = is_old
    try:
        if is_nobodys and is_still(part, file):
            part.unlink()
    finally:
        os.close(file)


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname(), flags=re.ASCII)


def _host_of(name: str) -> str:
    found = re.fullmatch(rf"{re.escape(PART)}(.+)-\d+-[0-9a-f]+", name)
    return found[1] if found else ""
