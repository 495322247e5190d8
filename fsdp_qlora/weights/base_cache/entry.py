"""An entry of the cache: the folder of one checkpoint in one codec, with a note of what it is. No torch here."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.runtime.files import user_cache
from fsdp_qlora.units import GIB, as_gib

NOTE = "base.json"
NAME = re.compile(r"[0-9a-f]{32}")  # of an entry's folder: what else is beside it stays
SUFFIX = ".safetensors"  # of a unit's file
KEPT_DAYS = 30  # after which an entry that no run has read is removed
MOST_FULL = 0.9  # of a disk, with the new entry


@dataclass(frozen=True)
class Note:
    """What an entry is."""

    model: str  # as the user named it, with the revision
    codec: str
    units: int  # of the whole base
    made: float  # seconds since 1970
    source: str  # the checkpoint's folder
    host: str  # on which that is
    content: str  # a hash of what tells the checkpoint's bytes


@dataclass(frozen=True)
class Entry:
    """An entry as it is on the disk."""

    folder: Path
    note: Note
    units: int  # that are there
    nbytes: int
    used: float  # when a run last read or wrote it, seconds since 1970


def cache_folder(option: str | None) -> Path | None:
    """Return the folder that the option base_cache means: None for null, or for auto where the user has no home."""
    if option is None:
        return None
    if option != "auto":
        return Path(option)
    folder = user_cache()
    return None if folder is None else folder / "base"


def entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries in a folder of the cache. Raises OSError where it is there and cannot be read."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if NAME.fullmatch(path.name):
            with suppress(OSError):  # another process has just removed it
                yield entry_at(path)


def entry_at(path: Path) -> Entry:
    """Return the entry in a folder. Raises OSError where there is none."""
    sizes = [file.stat().st_size for file in path.iterdir() if file.suffix == SUFFIX]
    found = path / NOTE if (path / NOTE).exists() else path
    return Entry(path, _read_note(path / NOTE), len(sizes), sum(sizes), found.stat().st_mtime)


def _read_note(file: Path) -> Note:
    try:
        return Note(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return Note("unknown", "unknown", 0, 0.0, "", "", "")


def write_note(folder: Path, note: Note) -> None:
    """Write an entry's note, if it has none. Raises OSError."""
    if _read_note(folder / NOTE).content != note.content:
        with atomic_file(folder / NOTE) as part:
            part.write_text(json.dumps(asdict(note), indent=1) + "\n")


def touch(folder: Path) -> None:
    """Note that an entry is in use, where it can be written."""
    with suppress(OSError):
        (folder / NOTE).touch(exist_ok=True)


def remove(entry: Entry) -> None:
    """Remove an entry from the disk. A run that is reading it encodes the rest anew. Raises OSError."""
    shutil.rmtree(entry.folder)


def remove_unused(folder: Path, days: float = KEPT_DAYS) -> None:
    """Remove the entries that no run has used for so long."""
    for entry in entries(folder):
        if entry.used < time.time() - days * 86400:
            with suppress(OSError):
                remove(entry)


def remove_stale(path: Path, note: Note) -> str:
    """Remove entries of the same checkpoint's earlier bytes; return a line that says so, '' where there were none.

    path: of the entry that takes their place."""
    gone = 0
    for entry in entries(path.parent):
        same = (entry.note.source, entry.note.host) == (note.source, note.host)
        if same and entry.folder != path and entry.note.content != note.content:
            with suppress(OSError):
                remove(entry)
                gone += entry.nbytes
    if not gone:
        return ""
    return f"base_cache: {note.source} has changed: {as_gib(gone)} quantized from its earlier files are removed"


def lack_of_room(folder: Path, nbytes: int) -> str:
    """Return why a disk has no room for so many bytes more, '' where it has. Raises OSError."""
    disk = shutil.disk_usage(folder)
    most = MOST_FULL * disk.total
    if disk.total - disk.free + nbytes <= most:
        return ""
    return (
        f"base_cache: not kept for the next start: {as_gib(nbytes)} more would fill the disk of {folder} beyond "
        f"{MOST_FULL:.0%} ({disk.free / GIB:.1f} of {as_gib(disk.total)} are free); free some space or set another "
        "folder"
    )
