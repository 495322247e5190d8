"""The commands cache list and cache clear: bases that were quantized and kept for the next start."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.commands.base import Command
from fsdp_qlora.config.options import command, option
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.runtime.files import cache_folder
from fsdp_qlora.units import as_gib, count_of
from fsdp_qlora.weights.base_cache.entry import BASES, Entry, entries, remove

DAY = 86400  # seconds


@dataclass
class CacheOptions:
    """Cache: which folder."""

    base_cache: str = option(
        "auto",
        "Folder of the cache, as of train.py. auto: fsdp_qlora/base in the user's cache folder.",
        "where runs keep theirs",
        is_path=True,
    )

    def folder(self) -> Path:
        """Return the cache's folder. Raises UserError where there is none."""
        folder = cache_folder(self.base_cache, BASES)
        if folder is None:
            raise UserError("base_cache: the user has no home folder; set the folder")
        if self.base_cache != "auto" and not folder.is_dir():
            raise UserError(f"base_cache: {folder} is no folder; set the one that train.py was given")
        return folder


@dataclass
class ClearOptions(CacheOptions):
    """Clear: which of the bases."""

    older_than_days: float | None = option(
        None,
        "Remove bases that no run has used for so many days.",
        "however lately they were used",
        unit="days",
        at_least=0,
    )
    model: str | None = option(
        None,
        "Remove the bases of this model alone, named as `cache list` shows it.",
        "of all models",
        is_path=True,
        known_as=("model_name", "model_name_or_path"),
    )


def list_bases(asked: CacheOptions) -> None:
    """Print a line for each base: size, codec, model, when it was made and last used."""
    folder = asked.folder()
    found = sorted(_found(folder), key=lambda entry: -entry.used)
    for entry in found:
        part = "" if entry.units == entry.note.units else f", {entry.units} of {entry.note.units} units"
        print(
            f"{as_gib(entry.nbytes):>10}  {entry.note.codec}  {entry.note.model}{part}; made {_day(entry.note.made)}, "
            f"last used {_day(entry.used)}"
        )
    print(f"{as_gib(sum(entry.nbytes for entry in found)):>10}  in {count_of(len(found), 'base')} in {folder}")


def clear(asked: ClearOptions) -> None:
    """Remove bases, and say how much that was."""
    folder = asked.folder()
    found = list(_found(folder))
    if asked.model is not None and asked.model not in {entry.note.model for entry in found}:
        held = ", ".join(sorted({entry.note.model for entry in found})) or "none"
        raise UserError(f"model: {folder} holds no base of {asked.model}; of these it does: {held}")
    oldest = time.time() - (asked.older_than_days or 0) * DAY
    gone = [e for e in found if e.used <= oldest and asked.model in (None, e.note.model)]
    for entry in gone:
        try:
            left = remove(entry)
        except OSError as error:
            raise TrainingStopped(f"{entry.folder} cannot be removed ({error.strerror})") from error
        stays = f", but for {left} files that are not of this program in {entry.folder}" if left else ""
        print(f"{as_gib(entry.nbytes):>10}  {entry.note.codec}  {entry.note.model}: removed{stays}")
    print(f"{as_gib(sum(entry.nbytes for entry in gone)):>10}  in {count_of(len(gone), 'base')} removed, {folder}")


def _found(folder: Path) -> Iterator[Entry]:
    try:
        yield from entries(folder)
    except OSError as error:
        raise UserError(f"base_cache: {folder} cannot be read ({error.strerror})") from error


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


CACHE_LIST = Command(
    "quantized bases that are kept for the next start",
    command(
        "python -m fsdp_qlora cache list [--base_cache FOLDER]",
        """Lists the bases that runs have quantized and kept: size, codec, model, when each was made and last used.""",
        CacheOptions,
    ),
    list_bases,
    interrupted="nothing was changed",
)
CACHE_CLEAR = Command(
    "removes such bases: all, or by model and age",
    command(
        "python -m fsdp_qlora cache clear [--older_than_days N] [--model MODEL] [--base_cache FOLDER]",
        """Removes bases that runs have quantized and kept. The next run over such a model quantizes it again.""",
        ClearOptions,
    ),
    clear,
    interrupted="the same command removes the rest",
)
