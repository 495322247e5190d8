"""Checkpoints on disk: folders `checkpoint-STEP` that appear whole, each with a manifest that is written last.

    checkpoint-200/
      adapter_model.safetensors         the master weights, float32, under PEFT's names: PEFT opens the folder
      adapter_config.json
      rank-00000-of-00002.safetensors   rank 0's slices of the optimizer's state, and its random numbers
      rank-00001-of-00002.safetensors
      checkpoint.json                   the manifest: step, options, what the data was, sizes and checksums of the files

While it is written a checkpoint is called `.checkpoint-200.part`, so that a run killed at any moment leaves whole
checkpoints, and hidden folders that the next run in this output_dir removes.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import UserError
from fsdp_qlora.training.tensor_file import checksum

MANIFEST, PREFIX = "checkpoint.json", "checkpoint-"
VERSION = 1  # of the layout above
UNFINISHED = re.compile(rf"\.{PREFIX}\d+\.(part|old|part\.old)")  # what killed runs leave
ABSENT = (FileNotFoundError, NotADirectoryError)  # errors that prove that there is no such file
READERS = 4  # threads that check files: a checksum takes 3 GB/s of one core


class Damaged(Exception):
    """A checkpoint of which the bytes prove that it is not whole, or not as it was written; says which file and why.

    A file that a disk does not give (OSError) proves nothing."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done
    ranks: int
    options: dict[str, Any]  # of the run that wrote it, as `Config.to_flat`
    data: dict[str, Any]  # the rows and how steps take them: see `resume.place_in`
    base: dict[str, Any]  # of the frozen weights: see `resume.base_of`
    adapters: list[list[Any]]  # name and shape of each adapter parameter, in the order of the optimizer's slices
    state: dict[str, Any]  # of each small part, by its name: see `checkpoint.Stateful`
    files: dict[str, list[int]]  # name -> bytes, CRC-32
    versions: dict[str, str]  # of the libraries that wrote it, for people
    version: int = VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    def is_in(self, folder: Path) -> bool:
        """Return whether `folder` is the output_dir of the run that it belongs to."""
        places = self.path.absolute().parent.resolve(), self.path.resolve().parent  # either may be a link to the other
        return folder.resolve() in places

    def run_folder(self, folder: Path) -> Path:
        """Return the output_dir of the run that it belongs to, which may be `folder`."""
        return folder if self.is_in(folder) else self.path.absolute().parent


def rank_file(rank: int, ranks: int) -> str:
    return f"rank-{rank:05}-of-{ranks:05}.safetensors"


def part_of(folder: Path, step: int) -> Path:
    """Return the name of a checkpoint that is being written."""
    return folder / f".{PREFIX}{step}.part"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return step -> folder of each checkpoint, oldest first; whether it is whole is not looked at. Raises OSError."""
    found = {}
    with suppress(*ABSENT):
        for path in folder.iterdir():
            step = path.name.removeprefix(PREFIX)
            if path.name.startswith(PREFIX) and step.isdecimal() and path.is_dir():
                found[int(step)] = path
    return dict(sorted(found.items()))


def is_ours(path: Path) -> bool:
    """Return whether a folder is a checkpoint of this program, whole or not: no other one is ever removed."""
    return (path / MANIFEST).is_file()


def ours_in(folder: Path) -> dict[int, Path]:
    """Return those of `checkpoints_in` that this program may remove."""
    return {step: path for step, path in checkpoints_in(folder).items() if is_ours(path)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with a checksum of itself, and put the folder's names on the disk. Raises OSError."""
    text = json.dumps(asdict(manifest), indent=1)
    lines = [f'{{"crc32": {zlib.crc32(text.encode())}, "manifest":', text, "}"]
    write_synced(folder / MANIFEST, ("\n".join(lines) + "\n").encode())
    sync_folder(folder)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file to the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint of which the manifest is sound and all files have their sizes.

    Raises Damaged; OSError where a file cannot be read; UserError where its layout is another."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except ABSENT as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Damaged(f"{MANIFEST} is damaged ({error})") from error
    try:
        first, rest = text.split("\n", 1)
        body = rest.rpartition("\n}")[0]
        if json.loads(first + " 0}")["crc32"] != zlib.crc32(body.encode()):
            raise ValueError("its checksum differs")
        content = json.loads(body)
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{MANIFEST} is damaged ({error})") from error
    if content.get("version") != VERSION or not content.keys() <= Manifest.__dataclass_fields__.keys():
        raise UserError(
            f"resume: {path} is in version {content.get('version')} of the layout and this program reads {VERSION}; go "
            "on with the version of this program that wrote it, or start anew in another output_dir"
        )
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        raise Damaged(f"{MANIFEST} is damaged ({error})") from error
    for name, (nbytes, _) in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except ABSENT as error:
            raise Damaged(f"{name} is missing") from error
        if found != nbytes:
            raise Damaged(f"{name} has {found:,} bytes and should have {nbytes:,}")
    return Checkpoint(path, manifest)


def check_files(checkpoint: Checkpoint) -> None:
    """Compare all files with their checksums. Raises Damaged, and OSError where a file cannot be read."""
    with ThreadPoolExecutor(READERS) as pool:
        wanted = checkpoint.manifest.files
        for name, found in zip(wanted, pool.map(checksum, (checkpoint.path / name for name in wanted)), strict=True):
            if found != wanted[name][1]:
                raise Damaged(f"{name} is not as it was written: its checksum differs")


def appear(part: Path, target: Path) -> None:
    """Give a checkpoint that is whole its name, in place of an old one that has it. Raises OSError."""
    if target.exists() and not is_ours(target):
        raise OSError(errno.EEXIST, f"{target.name} is there and is no checkpoint of this program")
    if target.exists():  # one that was damaged, of a run that has gone on from the one before
        _set_aside(target)
    part.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(_doomed(target), ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint, or let it be where that fails. It is never seen in part."""
    with suppress(OSError):
        _set_aside(path)
    shutil.rmtree(_doomed(path), ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left half written or half removed. Only by the run that has taken `folder`."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def surplus(steps: Iterable[int], limit: int | None, newest: int, best: int | None) -> list[int]:
    """Return which checkpoints to remove so that `limit` are left: the oldest, never the newest nor the best."""
    all_of_them = sorted(steps)
    removable = [step for step in all_of_them if step not in (newest, best)]
    return [] if limit is None else removable[: max(0, len(all_of_them) - limit)]


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: Path) -> None:
    shutil.rmtree(_doomed(path), ignore_errors=True)
    path.rename(_doomed(path))


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.old")
