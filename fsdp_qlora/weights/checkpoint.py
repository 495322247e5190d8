"""A checkpoint in a folder as a source of weights."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.weights.checkpoint_files import TensorFile, files_of, open_file, some
from fsdp_qlora.weights.source import Shape, StoredTensor

READERS = 4  # threads: enough to keep a disk busy
PAGE = 4096  # bytes
SHA256 = re.compile(r"[0-9a-f]{64}")
SAMPLED = 512  # numbers of a tensor, which lie on one or two pages
ROWS_COMPARED = 4096  # of an embedding and a head at a time


class Checkpoint:
    """Weight files of one folder. Only headers are read until `read`."""

    def __init__(self, folder: Path, workers: int = -1) -> None:
        self.folder = folder
        self.workers = workers if workers > 0 else READERS
        self._file_of: dict[str, TensorFile] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._files = files_of(folder)
        for file in map(open_file, self._files):
            tensors = file.tensors()
            self._tensors |= tensors
            self._file_of |= dict.fromkeys(tensors, file)

    def names(self) -> Set[str]:
        return self._file_of.keys()

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        missing = [name for name in expected if name not in self._tensors]
        plain = {name: shape for name, shape in expected.items() if name in self._tensors and shape is not None}
        wrong = [
            f"{name} is {list(self._tensors[name].shape)} and should be {list(shape)}"
            for name, shape in plain.items()
            if self._tensors[name].shape != tuple(shape)
        ]
        coded = [name for name in plain if name.endswith(".weight") and not self._tensors[name].is_float]
        if coded:
            raise UserError(
                f"model_name: {some(coded)} in {self.folder} are stored as integers or in 8 bits; nothing there says "
                "how they were quantized; use the model in 16 or 32 bits, or one of the *-bnb-4bit kind"
            )
        if missing or wrong:
            kinds = (("missing", missing), ("unknown", sorted(unknown)), ("mis-shaped", wrong))
            raise UserError(
                f"model_name: the tensors in {self.folder} do not fit its config.json; "
                f"{'; '.join(f'{kind}: {some(names)}' for kind, names in kinds if names)}. "
                "Is the download complete, and is the config of this model?"
            )

    def content(self) -> str:
        try:
            return json.dumps([_stamp(file) for file in self._files])
        except OSError as error:
            raise UserError(
                f"model_name: {error.filename or self.folder} cannot be read any more ({error.strerror}): was it moved "
                "or removed since the start? Download it again, or name the folder that it is in"
            ) from error

    def sample(self) -> str:
        opened, total = _Opened(), hashlib.sha256()
        for name in sorted(self._file_of):
            try:
                numbers = opened.reader(self._file_of[name])(name).flatten()[:SAMPLED]
            except (SafetensorError, OSError) as error:
                raise UserError(f"model_name: {name} in {self.folder} cannot be read ({error})") from error
            total.update(f"{name} {self._tensors[name]} {numbers.dtype}\n".encode())
            total.update(numbers.contiguous().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def name_in_files(self, name: str) -> str:
        return name

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        if self._tensors[one].shape != self._tensors[other].shape:
            return False
        first, second = (self._file_of[name].reader()(name) for name in (one, other))
        rows = zip(first.split(ROWS_COMPARED), second.split(ROWS_COMPARED), strict=True)
        return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in rows)

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        opened = _Opened()

        def one(name: str) -> Tensor:
            try:
                return _brought(opened.reader(self._file_of[name])(name))
            except (SafetensorError, OSError) as error:
                raise UserError(f"model_name: {name} in {self.folder} cannot be read ({error})") from error

        with ThreadPoolExecutor(self.workers) as pool:
            return dict(zip(wanted, pool.map(one, wanted), strict=True))


def _brought(mapped: Tensor) -> Tensor:
    """Return a tensor of a mapped file once its pages are in memory.

    They stay the system's, which takes them back where memory is short: a copy would be the process's own. Of 70B two
    blocks are here at a time, 3.2 GiB for each rank."""
    if not mapped.is_contiguous():
        return mapped.clone()
    numbers = mapped.view(-1).view(torch.uint8)
    numbers[::PAGE].sum()
    numbers[-1:].sum()
    return mapped


class _Opened(threading.local):
    """Files that a thread has opened to read several tensors: to open one is to parse all of its header."""

    def __init__(self) -> None:
        self._readers: dict[TensorFile, Callable[[str], Tensor]] = {}

    def reader(self, file: TensorFile) -> Callable[[str], Tensor]:
        if file not in self._readers:
            self._readers[file] = file.reader()
        return self._readers[file]


def _stamp(file: Path) -> list[str | int]:
    """Return what tells a file's bytes from those that it had before, and from another's.

    In the hub's cache that is their SHA-256, which is the name of the file itself: the same file downloaded again, at
    another time or on another machine, is the same. Elsewhere it is the path, the time of the last change, and the one
    at which the system noted a change: unlike the first it cannot be set, so a copy that keeps times is told from what
    it replaces."""
    target = file.resolve(strict=True)
    found = target.stat()
    if target.parent.name == "blobs" and SHA256.fullmatch(target.name):
        return [file.name, target.name, found.st_size]
    return [str(target), found.st_size, found.st_mtime_ns, found.st_ctime_ns]
