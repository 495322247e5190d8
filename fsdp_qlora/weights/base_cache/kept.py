"""One base in the cache: where the files of its units are, and under which names.

The name of an entry and those of its files say all that decides their bytes: what tells the checkpoint's bytes
(`Weights.content`), the codecs with their options, the units' layouts, the kind of device that encodes, the version of
the encoders. So nothing has to be compared when they are read, and what has changed is simply not there.
"""

import hashlib
import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fsdp_qlora.weights.base_cache.entry import (
    SUFFIX,
    Note,
    lack_of_room,
    remove_stale,
    remove_unused,
    touch,
    write_note,
)
from fsdp_qlora.weights.base_cache.unit_file import Contents, Reading, Writing, read_contents, sweep
from fsdp_qlora.weights.layout import Layout

VERSION = 1  # of encoders and layouts; counts up where one makes other bytes of the same options
ENCODERS = ("bitsandbytes", "hqq")  # packages that encode


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

    def __init__(self, folder: Path, units: Mapping[str, UnitKey], model: str, source: str, content: str, kind: str):
        """Find the names. folder: of the cache. model, source, content: as in `Note`, but content whole.

        kind: of the device that encodes."""
        self.content = content
        self.digests = {name: unit.digest for name, unit in units.items()}
        self._stored = {name: unit.layout.used for name, unit in units.items()}
        codecs = {e.codec for unit in units.values() for e in unit.layout.entries.values() if e.codec.quantizes}
        encoders = [VERSION, kind, sorted(map(repr, codecs)), *map(_version, ENCODERS)]
        names = "+".join(sorted(codec.name for codec in codecs))
        self.note = Note(model, names, len(units), time.time(), source, socket.gethostname(), _hash(content))
        self.folder = folder / _hash([encoders, content])

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

    def touch(self) -> None:
        """Note that the entry is in use."""
        touch(self.folder)

    def prepare(self, units: list[str]) -> tuple[str, str]:
        """Make the entry ready for files of these units.

        Returns (a line about what was removed or '', why no file can be written or '')."""
        stale = ""
        try:
            remove_unused(self.folder.parent)
            stale = remove_stale(self.folder, self.note)
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            write_note(self.folder, self.note)
            return stale, lack_of_room(self.folder, sum(self._stored[unit] for unit in units))
        except OSError as error:
            return stale, self.refusal(error)

    def refusal(self, error: OSError) -> str:
        """Return the line for a file that cannot be written."""
        return (
            f"base_cache: not kept for the next start: {self.folder.parent} cannot be written "
            f"({error.strerror or error}); set another folder, or null"
        )

    def withdraw(self) -> None:
        """Remove the entry's folder if it has no unit."""
        with suppress(OSError):
            if not any(file.suffix == SUFFIX for file in self.folder.iterdir()):
                for file in self.folder.iterdir():
                    file.unlink()
                self.folder.rmdir()


def _hash(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
