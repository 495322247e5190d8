"""An entry of the cache: the folder of one base as one encoder makes it, with a note of what it is. No torch here."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.weights.base_cache.names import ENTRY, NOTE, SUFFIX, USED, is_ours, used_mark

BASES = "base"  # the cache's part of the user's cache folder


@dataclass(frozen=True)
class Note:
    """What an entry is."""

    model: str  # as the user named it, with the revision
    codec: str
    units: int  # of the whole base
    made: float  # seconds since 1970
    source: str  # the checkpoint's folder, or its name on the hub
    host: str  # on which that is
    content: str  # a hash of what tells the checkpoint's files
    layout: str  # a hash of what the units are, whoever encodes them
    encoders: Mapping[str, str]  # as `Encoders.versions`


UNKNOWN = Note("unknown", "unknown", 0, 0.0, "", "", "", "", {})


@dataclass(frozen=True)
class Entry:
    """An entry as it is on the disk."""

    folder: Path
    note: Note
    units: int  # that are there
    nbytes: int  # of all files in it
    used: float  # when a run last read or wrote it, seconds since 1970


def entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries in a folder of the cache. Raises OSError where it is there and cannot be read."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(OSError):  # another process has just removed it
            entry = entry_at(path)
            if entry is not None:
                yield entry


def entry_at(path: Path) -> Entry | None:
    """Return the entry in a folder, None where it is none: an entry has a name like one and a note of this program's,
    or no file that is not. Raises OSError where it cannot be read."""
    if not ENTRY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return None
    files, note = list(path.iterdir()), read_note(path)
    if note is None and (not files or not all(is_ours(file.name) for file in files)):
        return None
    stats = {file.name: file.lstat() for file in files}
    marks = [stat.st_mtime for name, stat in stats.items() if name == NOTE or name.startswith(USED)]
    units = sum(name.endswith(SUFFIX) and is_ours(name) for name in stats)
    nbytes = sum(stat.st_size for stat in stats.values())
    return Entry(path, note or UNKNOWN, units, nbytes, max(marks, default=path.stat().st_mtime))


def read_note(folder: Path) -> Note | None:
    """Return an entry's note; None where there is none of this program's."""
    try:
        found = json.loads((folder / NOTE).read_text())
        note = Note(**found)
    except (OSError, ValueError, TypeError):
        return None
    kinds: dict[str, type | UnionType] = {"units": int, "made": int | float, "encoders": dict}
    fits = all(isinstance(getattr(note, field.name), kinds.get(field.name, str)) for field in fields(Note))
    return note if fits else None


def write_note(folder: Path, note: Note) -> bool:
    """Write an entry's note, if it has none; return whether. Raises OSError."""
    if read_note(folder) is not None:
        return False
    with atomic_file(folder / NOTE) as part:
        part.write_text(json.dumps(asdict(note), indent=1) + "\n")
    return True


def mark_used(folder: Path) -> None:
    """Note that this user has just used an entry. One who may not write there leaves no mark: see the docs."""
    with suppress(OSError):
        (folder / used_mark()).touch(exist_ok=True)


def remove(entry: Entry) -> int:
    """Remove an entry's files, by their names, and its folder; return how many other files are there, which stay.

    A run that is reading it encodes the rest anew. Raises OSError."""
    ours = [file for file in entry.folder.iterdir() if is_ours(file.name) and (file.is_symlink() or not file.is_dir())]
    for file in sorted(ours, key=lambda file: file.name == NOTE):  # the note last: until then it is an entry
        file.unlink(missing_ok=True)
    left = len(list(entry.folder.iterdir()))
    if not left:
        entry.folder.rmdir()
    return left
