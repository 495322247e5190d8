"""Sources of rows: fsdp_qlora's dataset names, the hub, files, folders, standard input. Rows leave as they are."""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fsdp_qlora.data.folders import HELD_OUT, files_of
from fsdp_qlora.data.packed import Placed
from fsdp_qlora.data.readers import SUFFIXES, kind_of, read_file, without_nulls
from fsdp_qlora.errors import UserError, first_line

STDIN = "-"


@dataclass(frozen=True)
class Named:
    """One of fsdp_qlora's dataset names: the hub id and what that program does with it."""

    hub_id: str
    config: str | None = None
    split: str = "train"
    samples: int | None = None  # rows taken when dataset_samples is not given; None = all
    shuffle_seed: int | None = None  # shuffled before rows are taken; fixed, so that the held-back rows stay the same
    skip: int = 0  # rows held back after shuffling (fsdp_qlora's evaluation uses them)
    form: str = "auto"
    exact: bool = False  # the user has named the split
    held_out: bool = False  # a split to evaluate on is wanted, where there is one and none is named


NAMES = {
    "alpaca": Named("yahma/alpaca-cleaned"),
    "alpaca_sample": Named("yahma/alpaca-cleaned", samples=512),
    "guanaco": Named("timdettmers/openassistant-guanaco", form="guanaco"),
    "sql": Named("knowrohit07/know_sql", split="validation", shuffle_seed=42, skip=1000),
    "orca_math": Named("microsoft/orca-math-word-problems-200k", samples=512, shuffle_seed=42),
}


@dataclass
class Source:
    """Rows on their way in. `rows` yields (location, row), as ('line 17', {...}). Read it once.

    content: a number that changes with what the rows hold (hexadecimal), or '' where that cannot be told cheaply.
    """

    name: str
    rows: Iterator[Placed]
    form: str = "auto"
    content: Callable[[], str] = lambda: ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One dataset of --dataset, with its share of the rows where it has one."""

    name: str
    weight: float | None = None


def parts_of(dataset: str) -> list[Part]:
    """Split `a.jsonl:0.7,b.jsonl:0.3` into its datasets. Raises UserError where only some of them have a weight."""
    if Path(dataset).expanduser().exists():
        return [Part(dataset)]
    parts = [_part(text.strip()) for text in dataset.split(",")]
    if not all(part.name for part in parts):
        raise UserError(f"dataset {dataset!r}: names nothing between two commas; write a.jsonl,b.jsonl")
    weighted = [part for part in parts if part.weight is not None]
    if weighted and len(weighted) < len(parts):
        raise UserError(f"dataset {dataset!r}: give every dataset a weight (a.jsonl:0.7,b.jsonl:0.3), or none")
    if len(parts) == 1 and weighted:
        raise UserError(f"dataset {dataset!r}: a weight says nothing about one dataset alone; omit it")
    if len(parts) > 1 and "dummy" in [part.name for part in parts]:
        raise UserError(f"dataset {dataset!r}: dummy has no rows to mix with others; give it alone")
    if len({_plain(part.name) for part in parts}) < len(parts):
        raise UserError(f"dataset {dataset!r}: names a dataset twice; name each once")
    return parts


def _plain(name: str) -> str:
    """Return the one name of a dataset: a file has many, as a.jsonl and ./a.jsonl."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else NAMES[name].hub_id if name in NAMES else name


def _part(text: str) -> Part:
    name, colon, last = text.rpartition(":")
    if not colon or not re.fullmatch(r"\d+|\d*\.\d+(e-?\d+)?", last) or Path(text).expanduser().exists():
        return Part(text)
    if float(last) <= 0:
        raise UserError(f"dataset {text!r}: its weight must be above 0; omit the dataset instead")
    return Part(name, float(last))


def open_source(dataset: str, samples: int | None, held_out: bool = False) -> Source:
    """Open one dataset (a name, a local path, `-`, a hub id or `id:config:split`): the first `samples` of its rows.

    held_out: of a folder or a hub dataset without a split take what is named validation, test or alike, if there is.
    No row is read before the first is taken. Raises UserError for a missing file and an unknown file type; while rows
    are taken, for a malformed file (with the line) and for what the hub does not have.
    """
    if dataset in NAMES:
        named = NAMES[dataset]
        return _hub(dataset, named, samples or named.samples)
    if dataset == STDIN:
        path = keep_stdin()
        kind = ".json" if path.open("rb").read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" else ".jsonl"
        return Source(STDIN, islice(_renamed(read_file(path, kind), path), samples), content=lambda: digest([path]))
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _folder(dataset, path, samples, held_out)
    if not path.exists() and ":" in dataset and Path(dataset.partition(":")[0]).expanduser().exists():
        raise UserError(f"dataset {dataset!r}: a local path takes no config or split after a colon; omit it")
    if path.is_file() or kind_of(path) or dataset.startswith((".", "/", "~")):
        return Source(dataset, islice(read_file(path), samples), content=lambda: digest([path]))
    hub_id, _, rest = dataset.partition(":")
    config, _, split = rest.partition(":")
    named = Named(hub_id, config or None, split or "train", exact=bool(split), held_out=held_out and not split)
    return _hub(dataset, named, samples)


@contextmanager
def told_as(option: str) -> Iterator[None]:
    """Say in a mistake which option names the dataset."""
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub("^dataset ", f"{option} ", str(error))) from error


def check_sources(dataset: str, option: str) -> None:
    """Raise UserError for what `option` names and is not on this machine, before rows of another are tokenized."""
    with told_as(option):
        for part in parts_of(dataset):
            open_source(part.name, None)


def is_local(dataset: str) -> bool:
    """Return whether all datasets of --dataset are read without the hub."""
    try:
        parts = parts_of(dataset)
    except UserError:
        return True  # told when the rows are read
    return all(part.name in ("dummy", STDIN) or Path(part.name).expanduser().exists() for part in parts)


def digest(files: Iterable[Path]) -> str:
    """Return a number of what files hold, hexadecimal; '' where one cannot be read."""
    total = hashlib.blake2b(digest_size=16)
    try:
        for file in files:
            total.update(kind_of(file).encode())
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "blake2b").digest())
    except OSError:
        return ""
    return total.hexdigest()


def keep_stdin() -> Path:
    """Copy standard input to a file, once for all ranks of a node: torchrun gives the one pipe to all of them.

    The first rank of a node must come first. Raises UserError where nothing is piped in.
    """
    path = stdin_file()
    if not path.exists():
        if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise UserError(
                "dataset '-': nothing is piped to standard input; use `cat rows.jsonl | python train.py ...`"
            )
        part = path.with_suffix(f".{os.getpid()}")
        with part.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        part.replace(path)
    return path


def stdin_file() -> Path:
    """Return where standard input is kept during the run: named after the process that all ranks of a node share.

    Its start is in the name too: a restarted container has its numbers again, and what a killed run left there."""
    shared = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return Path(tempfile.gettempdir()) / f"fsdp_qlora-stdin-{os.getuid()}-{shared}-{_start_of(shared)}"


def _start_of(process: int) -> str:
    """Return when a process was started, in ticks since the system was; '' where the system does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def forget_stdin() -> None:
    """Remove the copy of standard input, once every rank has read it."""
    with suppress(OSError):
        stdin_file().unlink(missing_ok=True)


def _renamed(rows: Iterator[Placed], path: Path) -> Iterator[Placed]:
    try:
        yield from rows
    except UserError as error:
        raise type(error)(str(error).replace(repr(str(path)), repr(STDIN))) from error


def _folder(dataset: str, path: Path, samples: int | None, held_out: bool) -> Source:
    """Open a folder: one that `save_to_disk` wrote, or files, those of them that are for training, or held out."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _hub(dataset, Named(str(path), held_out=held_out), samples)
    chosen, left = files_of(dataset, path, held_out)
    if not chosen:
        raise UserError(
            f"dataset {dataset!r}: the folder could not be loaded as a dataset (it holds no file of rows to train on); "
            f"give one of {', '.join(['dummy', *NAMES])}, or files ending in {', '.join(SUFFIXES)}"
        )
    notes = [f"{dataset}: left out {', '.join(str(file.relative_to(path)) for file in left)}"] if left else []
    return Source(dataset, islice(_of_files(chosen, path), samples), content=lambda: digest(chosen), notes=notes)


def _of_files(files: list[Path], root: Path) -> Iterator[Placed]:
    for file in files:
        for location, row in read_file(file):
            yield f"{file.relative_to(root)}, {location}", row


def _hub(dataset: str, named: Named, samples: int | None) -> Source:
    loaded: list[Any] = []

    def table() -> Any:
        if not loaded:
            loaded.append(_table(dataset, named))
        return loaded[0]

    def rows() -> Iterator[Placed]:
        stop = len(table()) if samples is None else min(len(table()), named.skip + samples)
        for start in range(named.skip, stop, 1024):
            columns = table()[start : min(start + 1024, stop)]
            for offset in range(min(1024, stop - start)):
                yield f"row {start + offset}", {key: without_nulls(held[offset]) for key, held in columns.items()}

    return Source(dataset, rows(), named.form, lambda: str(getattr(table(), "_fingerprint", "")) + f"-{samples}")


def _table(dataset: str, named: Named) -> Any:
    import datasets  # with pandas and Arrow 0.9 s and 80 MiB on every rank, which rows of a local file do not need

    folder = Path(named.hub_id).is_dir()
    try:
        if folder:
            splits = datasets.load_from_disk(named.hub_id)
        else:
            splits = datasets.load_dataset(named.hub_id, *([named.config] if named.config else []))
    except Exception as error:  # the hub's client raises from a dozen libraries; whatever it is, the user must know it
        tried = "the folder could not be loaded as a dataset" if folder else "could not be loaded from the hub"
        tried += "" if folder else f" as {named.hub_id!r}"
        known = ", ".join(["dummy", *NAMES])
        raise UserError(
            f"dataset {dataset!r}: {tried} ({first_line(error)}); "
            f"give one of {known}, a hub id, id:config:split, or a path ending in {', '.join(SUFFIXES)}"
        ) from error
    if not hasattr(splits, "keys"):
        return splits
    split = named.split if named.split in splits or named.exact or len(splits) != 1 else next(iter(splits))
    if named.held_out:
        split = next((name for name in HELD_OUT if name in splits), split)
    if split not in splits:
        raise UserError(
            f"dataset {dataset!r}: has no split {split!r}, only {', '.join(splits)}; "
            f"choose one with {named.hub_id}:{named.config or ''}:SPLIT"
        )
    table = splits[split]
    return table if named.shuffle_seed is None else table.shuffle(seed=named.shuffle_seed)
