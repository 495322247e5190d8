"""The disk that a cache is on: its kind, its room, and what it answers when it refuses."""

import errno
import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.units import GIB, as_gib
from fsdp_qlora.weights.base_cache.names import full_mark

MOST_FULL = 0.9  # of a disk, with the new entry
LITTLE = 0.01  # of what a disk has free: so much fills none, however full it is
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NOT_KEPT = "base_cache: not kept for the next start"
# File systems on which a folder is another machine's, or in this one's memory, by their names in /proc/mounts.
REMOTE = re.compile(
    r"nfs\d?|lustre|cifs|smb\w*|afs|ceph|glusterfs|gpfs|beegfs\w*|pvfs2|orangefs|panfs|wekafs|9p|davfs\d?"
    r"|fuse(\.(?!fuse-overlayfs).*)?"  # sshfs, buckets; which of them are local is not told
)
IN_MEMORY = re.compile(r"tmpfs|ramfs")


@dataclass(frozen=True)
class Owed:
    """Disk space that a run has been promised for what it writes later."""

    folder: Path  # of the run
    nbytes: int

    def on_disk_of(self, folder: Path) -> int:
        """Return the bytes that are owed on the disk of `folder`. Raises OSError where that cannot be told."""
        if not self.folder.is_dir():  # another node's
            return 0
        # Volumes of one pool have numbers of their own and the pool's size.
        same = os.stat(self.folder).st_dev == os.stat(folder).st_dev
        same = same or shutil.disk_usage(self.folder).total == shutil.disk_usage(folder).total
        return self.nbytes if same else 0


NOTHING_OWED = Owed(Path(), 0)


@dataclass(frozen=True)
class Full:
    """A note that the disk refused an entry, so that the next start does not fill it again."""

    reason: str  # of the system
    is_quota: bool  # which the disk's free space does not show
    free: int  # bytes, once what was written had been removed
    missing: int  # bytes that were still to be written
    when: float  # seconds since 1970

    def __str__(self) -> str:
        once = "" if self.is_quota else f" or once {as_gib(self.missing)} more are free"
        return f"tried again after `python -m fsdp_qlora cache clear`{once}; --base_cache null: never"


def kind_of_disk(folder: Path) -> str:
    """Return the type of the file system that `folder` is on, or would be, by the name that the system has for it; ''
    where it does not tell."""
    path = folder.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    path = path.resolve()
    try:
        lines = Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        point, found = line.split(" ")[1:3]
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        if (path == mounted or mounted in path.parents) and len(mounted.parts) >= best:  # the last one covers others
            best, kind = len(mounted.parts), found
    return kind


def unfit_by_default(folder: Path) -> str:
    """Return why no base is kept in `folder` unless the user names it, '' where it is."""
    kind = kind_of_disk(folder)
    if REMOTE.fullmatch(kind):
        return f"is on a network mount, or may be ({kind}): others fill it and wait for it"
    if IN_MEMORY.fullmatch(kind):
        return f"is in memory ({kind}), which the run needs"
    return ""


def lack_of_room(folder: Path, nbytes: int, owed: Owed = NOTHING_OWED) -> str:
    """Return why a disk has no room for so many bytes more, '' where it has. Raises OSError."""
    disk, later = shutil.disk_usage(folder), owed.on_disk_of(folder)
    more = nbytes + later
    if disk.total - disk.free + more <= MOST_FULL * disk.total or more <= LITTLE * disk.free:
        return ""
    promised = f" and the {as_gib(later)} that this run's adapter and checkpoints may take" if later else ""
    return (
        f"{NOT_KEPT}: {as_gib(nbytes)} more{promised} would fill the disk of {folder} beyond {MOST_FULL:.0%} "
        f"({disk.free / GIB:.1f} of {as_gib(disk.total)} are free); free some space or set another folder"
    )


def refusal(folder: Path, error: OSError) -> str:
    """Return the line for a file in `folder` that cannot be written."""
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return f"{NOT_KEPT}: the disk of {folder} has no room ({reason}); free some space or set another folder"
    if error.errno == errno.ENOENT:
        return f"{NOT_KEPT}: {folder} was removed while it was written to; the next start writes it"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{NOT_KEPT}: this user cannot write to {folder} ({reason}); set another folder, or null"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{NOT_KEPT}: {folder} cannot be written ({reason}); set a folder, or null"
    return f"{NOT_KEPT}: {folder} cannot be written ({reason}): look at the disk; set another folder, or null"


def note_full(folder: Path, error: OSError, missing: int) -> Full:
    """Note that the disk has refused the entry in `folder`, with its free space now; return the note, also where it
    cannot be written.

    missing: bytes that were still to be written."""
    free = 0
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
    full = Full(error.strerror or str(error), error.errno == errno.EDQUOT, free, missing, time.time())
    with suppress(OSError), atomic_file(folder / full_mark()) as part:
        part.write_text(json.dumps(asdict(full)) + "\n")
    return full


def noted_full(folder: Path) -> Full | None:
    """Return this user's note that the disk has refused the entry in `folder`; None where there is none."""
    try:
        return Full(**json.loads((folder / full_mark()).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def still_full(folder: Path) -> str:
    """Return the line for a disk that has refused the entry in `folder` and has no more room since, else ''.

    Raises OSError. Forgets the note where there is more room."""
    full = noted_full(folder)
    if full is None:
        return ""
    if full.is_quota or shutil.disk_usage(folder).free < full.free + full.missing:
        day = time.strftime("%Y-%m-%d", time.localtime(full.when))
        return f"{NOT_KEPT}: the disk of {folder} refused it on {day} ({full.reason}); {full}"
    (folder / full_mark()).unlink(missing_ok=True)
    return ""
