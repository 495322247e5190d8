"""One base in the cache: where the files of its units are, and under which names.

The name of an entry and those of its files say all that decides their bytes: what tells the checkpoint's files
(`Weights.content`), the units with their codecs, options and layouts, and what encodes them (`encoders`). So nothing
has to be compared when they are read, and what has changed is simply not there.
"""

import errno
import hashlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.weights.base_cache.disk import (
    NOTHING_OWED,
    Full,
    Owed,
    lack_of_room,
    note_full,
    noted_full,
    refusal,
    still_full,
)
from fsdp_qlora.weights.base_cache.entry import Note, mark_used, read_note, write_note
from fsdp_qlora.weights.base_cache.names import NOTE, SUFFIX, used_mark
from fsdp_qlora.weights.base_cache.part import sweep
from fsdp_qlora.weights.base_cache.tidy import remove_replaced, remove_unused
from fsdp_qlora.weights.base_cache.unit_file import Contents, Reading, Writing, read_contents
from fsdp_qlora.weights.layout import Layout


@dataclass(frozen=True)
class UnitKey:
    """A unit as the cache knows it."""

    layout: Layout
    sources: Mapping[str, str]  # entry of the layout -> its name in the checkpoint, or what else it is made from

    @property
    def digest(self) -> str:
        """A hash of the layout and of what it is made from; padding for several ranks is not in it."""
        entries = [
            [name, entry.codec.name, repr(entry.codec), entry.shape, self.sources.get(name)]
            + [[part, str(p.dtype), p.shape, p.offset, p.nbytes] for part, p in entry.parts.items()]
            for name, entry in self.layout.entries.items()
        ]
        return _hash([entries, self.layout.used])


class KeptBase:
    """The files of one base, of which some, all or none may be there."""

    def __init__(
        self,
        folder: Path,
        units: Mapping[str, UnitKey],
        model: str,
        source: str,
        content: str,
        encoders: Mapping[str, str],
    ) -> None:
        """Find the names. folder: of the cache. The rest is as in `Note`, but content whole."""
        self.content = content
        self.digests = {name: unit.digest for name, unit in units.items()}
        self._stored = {name: unit.layout.used for name, unit in units.items()}
        codecs = {e.codec for unit in units.values() for e in unit.layout.entries.values() if e.codec.quantizes}
        names = "+".join(sorted(codec.name for codec in codecs))
        host, layout = socket.gethostname(), _hash(sorted(self.digests.items()))
        self.note = Note(model, names, len(units), time.time(), source, host, _hash(content), layout, dict(encoders))
        self.folder = folder / _hash([sorted(encoders.items()), content, layout])
        self._made_note = False

    def path(self, unit: str) -> Path:
        return self.folder / f"{self.digests[unit]}{SUFFIX}"

    def contents(self, unit: str) -> Contents:
        """Return what the header of a unit's file says. Raises Damaged, FileNotFoundError, OSError."""
        return read_contents(self.path(unit), self.digests[unit])

    def open(self, unit: str, contents: Contents) -> Reading:
        """Open a unit's file. Raises OSError."""
        return Reading(self.path(unit), contents)

    def begin(self, unit: str, total: int) -> Writing:
        """Begin a unit's file. total: `frozen_bytes.checksum` of its bytes. Raises OSError."""
        return Writing(self.path(unit), unit, self.digests[unit], self._stored[unit], total)

    def tidy(self) -> str:
        """Remove what no run has used for long; return a line about it, '' where there is none."""
        return remove_unused(self.folder.parent, self.folder)

    def touch(self) -> None:
        """Note that the entry is in use."""
        mark_used(self.folder)

    def prepare(self, units: Iterable[str], owed: Owed = NOTHING_OWED) -> tuple[list[str], str]:
        """Make the entry ready for files of these units.

        Returns (lines about what was removed, why no file can be written or '')."""
        removed = remove_replaced(self.folder, self.note)
        try:
            self.make()
            sweep(self.folder)
            refused = still_full(self.folder) or self.lack_of_room(units, owed)
            if not refused:
                self.touch()  # else another run's `tidy` may take it away while it is written
            return removed, refused
        except OSError as error:
            return removed, self.refusal(error)

    def lack_of_room(self, units: Iterable[str], owed: Owed) -> str:
        """Return why the disk has no room for files of these units, '' where it has. Raises OSError."""
        return lack_of_room(self.folder, sum(self._stored[unit] for unit in units), owed)

    def refusal(self, error: OSError) -> str:
        """Return the line for a file that cannot be written."""
        return refusal(self.folder if error.errno == errno.ENOENT else self.folder.parent, error)

    def refuse(self, error: OSError, missing: Iterable[str]) -> Full:
        """Note, for the next starts too, that the disk has no room. missing: units that were still to be written."""
        return note_full(self.folder, error, sum(self._stored[unit] for unit in missing))

    def refused(self) -> Full | None:
        """Return what `refuse` has noted, on any rank."""
        return noted_full(self.folder)

    def withdraw(self) -> None:
        """Remove the entry again if this run has made it and nothing is in it."""
        own = {NOTE, used_mark()}
        with suppress(OSError):
            names = {file.name for file in self.folder.iterdir()}
            if self._made_note and names <= own:  # else another run writes there
                for name in names:
                    (self.folder / name).unlink()
                names = set()
            if not names:
                self.folder.rmdir()

    def make(self) -> None:
        """Make the entry where it is not there, or has been removed meanwhile by another run or the user.

        Raises OSError."""
        if not (self.folder / NOTE).exists() or read_note(self.folder) is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made_note = write_note(self.folder, self.note) or self._made_note
            mark_used(self.folder)


def _hash(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:32]
