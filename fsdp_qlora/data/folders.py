"""Files of rows in a folder: those to train on or to evaluate on, and those that are left out."""

import re
from pathlib import Path

from fsdp_qlora.data.readers import kind_of
from fsdp_qlora.errors import UserError

TRAIN = {"train", "training"}
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")  # the first one first
NO_ROWS = ("dataset_info.json", "dataset_infos.json")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # a numbered part, as train-00000-of-00002.parquet
# Suffixes of files that may hold rows, but are not read.
UNREAD = {
    ".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".feather", ".orc", ".avro", ".xlsx", ".xls", ".ods", ".txt",
    ".pkl", ".pickle", ".npy", ".npz", ".pt", ".tfrecord", ".incomplete", ".part", ".crdownload",
}  # fmt: skip


def files_of(dataset: str, folder: Path, held_out: bool) -> tuple[list[Path], list[Path]]:
    """Return (files to read, files that may hold rows and are left out).

    Those named train are read, else all that are not named test, validation or alike; if `held_out` it is these.
    Raises UserError where one of several numbered parts is missing."""
    there = (file for file in sorted(folder.rglob("*")) if file.is_file())
    shown = [file for file in there if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in shown if kind_of(file) and file.name not in NO_ROWS]
    kept_back = [file for file in files if _words(file, folder) & set(HELD_OUT) and not _words(file, folder) & TRAIN]
    chosen = [file for file in files if _words(file, folder) & TRAIN]
    chosen = chosen or [file for file in files if file not in kept_back]
    chosen = kept_back or chosen if held_out else chosen
    _check_parts(dataset, chosen)
    unread = [file for file in shown if not kind_of(file) and file.suffix.lower() in UNREAD]
    return chosen, [*(file for file in files if file not in chosen), *unread]


def _words(file: Path, root: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", str(file.relative_to(root)).lower()))


def _check_parts(dataset: str, files: list[Path]) -> None:
    """Raise UserError where a numbered part is missing: its rows would be, without a word."""
    there: dict[tuple[str, int, str], set[int]] = {}
    for file in files:
        if part := SHARD.fullmatch(str(file)):
            there.setdefault((part[1], int(part[3]), part[4]), set()).add(int(part[2]))
    for (begins, count, ends), numbers in there.items():
        if len(numbers) < count:
            begin = 0 if count not in numbers else 1  # some count from one
            missing = next(number for number in range(begin, count + 1) if number not in numbers)
            name = f"{Path(begins).name}-{missing:05d}-of-{count:05d}{ends}"
            raise UserError(
                f"dataset {dataset!r}: holds {len(numbers)} of {count} parts, {name} is missing; fetch it, or name the "
                "files to read"
            )
