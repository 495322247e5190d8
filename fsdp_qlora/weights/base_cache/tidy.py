"""Removal of what no run needs any more from a folder of the cache. What is removed is returned, to be said."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from fsdp_qlora.units import as_gib
from fsdp_qlora.weights.base_cache.encoders import are_older
from fsdp_qlora.weights.base_cache.entry import Entry, Note, entries, remove
from fsdp_qlora.weights.base_cache.names import ENTRY, HOME
from fsdp_qlora.weights.base_cache.part import ABANDONED, sweep

KEPT_DAYS = 30  # after which an entry that no run has read is removed


def remove_unused(folder: Path, own: Path, days: float = KEPT_DAYS) -> str:
    """Remove entries that no run has used for so long, other than `own`, and in all of them what killed runs have left.

    Returns a line that says so, '' where there were none."""
    with suppress(OSError):  # a folder that cannot be read
        for path in folder.iterdir():
            if ENTRY.fullmatch(path.name) and not path.is_symlink() and path.is_dir():
                sweep(path)
                _remove_old_marks(path)
    oldest = time.time() - days * 86400
    gone = _removed(folder, lambda entry: entry.folder != own and entry.used < oldest)
    return _line(gone, f"no run has used it for {days:g} days")


def remove_replaced(own: Path, note: Note) -> list[str]:
    """Remove entries that the one of `note`, at `own`, takes the place of: of earlier bytes of the same checkpoint, and
    of the same bytes and units where the same device encoded them with older packages.

    Returns lines that say so."""

    def is_of_the_source(entry: Entry) -> bool:
        return entry.folder != own and (entry.note.source, entry.note.host) == (note.source, note.host)

    def is_stale(entry: Entry) -> bool:
        return is_of_the_source(entry) and entry.note.content != note.content

    def is_older(entry: Entry) -> bool:
        same = (entry.note.content, entry.note.layout) == (note.content, note.layout)
        return is_of_the_source(entry) and same and are_older(entry.note.encoders, note.encoders)

    return [
        line
        for line in (
            _line(_removed(own.parent, is_stale), f"{note.source} has changed since"),
            _line(_removed(own.parent, is_older), "newer packages quantize it anew"),
        )
        if line
    ]


def _removed(folder: Path, goes: Callable[[Entry], bool]) -> list[Entry]:
    def gone() -> Iterator[Entry]:
        for entry in entries(folder):
            if goes(entry):
                with suppress(OSError):  # of another user's, or removed by another run
                    remove(entry)
                    yield entry

    try:
        return list(gone())
    except OSError:  # the folder cannot be read
        return []


def _line(gone: list[Entry], why: str) -> str:
    what = ", ".join(f"{as_gib(entry.nbytes)} of {entry.note.model} in {entry.note.codec}" for entry in gone)
    return f"base_cache: removed, as {why}: {what}" if gone else ""


def _remove_old_marks(folder: Path) -> None:
    for mark in folder.glob(f"{HOME}*"):
        with suppress(OSError):
            if mark.stat().st_mtime < time.time() - ABANDONED:
                mark.unlink()
