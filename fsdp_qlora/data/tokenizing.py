"""Rows of one dataset -> tokens, in chunks, on all cores; bad rows with their location; what was left out and why."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
from tqdm import tqdm

from fsdp_qlora.data.forms import Columns
from fsdp_qlora.data.json_files import parse_line
from fsdp_qlora.data.packed import Placed
from fsdp_qlora.data.templates import WORDLESS, Example, Template
from fsdp_qlora.data.tokens import Encoder, Tokens
from fsdp_qlora.errors import BadRow, TrainingStopped
from fsdp_qlora.runtime.launcher import usable_cores

T = TypeVar("T")

CHUNK = 512  # rows that a process takes at a time
MANY = 2 * CHUNK  # rows from which on it pays to start processes
BAD_SHOWN = 3  # bad rows that are named
BEYOND = "no answer token within context_length {context}"
NOTHING = "nothing to learn"
UNKNOWN = "characters that the tokenizer does not know, taken for its unknown token"
BAR_AFTER_SECONDS = 2.0
LINE_EVERY_SECONDS = 15.0


@dataclass
class Chunk:
    """Tokenized rows, flat, with what was seen on the way."""

    ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    trains: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    index: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    n_read: int = 0
    n_truncated: int = 0
    n_cut: int = 0  # tokens
    n_split: int = 0
    n_bad: int = 0
    bad: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    notes: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)


@dataclass
class Work:
    """The way of rows: columns -> template -> tokens -> cut or split at the context."""

    name: str
    columns: Columns
    template: Template
    encoder: Encoder
    context_length: int
    split: bool
    skip_bad: bool

    def chunk(self, first: int, rows: list[Placed]) -> Chunk:
        """Tokenize the rows from number `first` on. Raises BadRow at the first bad one, unless those are skipped."""
        examples: list[Example] = []
        numbers: list[int] = []
        bad: list[str] = []
        for number, (location, raw) in enumerate(rows, start=first):
            try:
                examples.append(self._example(location, raw))
                numbers.append(number)
            except BadRow as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error).removeprefix(f"dataset {self.name!r}: "))
        return self._collect(numbers, examples, bad, len(rows))

    def _example(self, location: str, raw: object) -> Example:
        where = f"dataset {self.name!r}: {location}"
        example = self.template(self.columns.fields(parse_line(where, raw), where), where)  # type: ignore[arg-type]
        for piece in example.pieces:
            if not piece.text.isascii():
                try:
                    piece.text.encode()
                except UnicodeEncodeError as error:
                    half = piece.text[error.start]
                    raise BadRow(
                        f"{where}: holds half a character ({half!r}, a surrogate alone), which no tokenizer takes; "
                        "mend the row, or --bad_rows skip"
                    ) from error
        return example

    def _collect(self, numbers: list[int], examples: list[Example], bad: list[str], n_read: int) -> Chunk:
        made = Chunk(n_read=n_read, n_bad=len(bad), bad=bad[:BAD_SHOWN])
        kept: list[tuple[int, Tokens]] = []
        for number, example, row in zip(numbers, examples, self.encoder.encode(examples), strict=True):
            made.notes.update(set(example.notes))
            parts = self._parts(row)
            made.n_split += len(parts) > 1
            if len(row.ids) > self.context_length and not self.split:
                made.n_truncated += 1
                made.n_cut += len(row.ids) - self.context_length
            if parts:
                blank = not example.complete and any(p.is_answer and not p.text.strip() for p in example.pieces)
                made.notes.update([WORDLESS.format("its end")] * blank)
                made.notes.update([UNKNOWN] * self.encoder.has_unknown(example, row))
                kept += [(number, part) for part in parts]
            else:
                made.dropped[example.empty or (BEYOND if row.trains.any() else NOTHING)] += 1
        made.seen, made.used = self.columns.seen, self.columns.used
        if kept:
            made.ids = np.concatenate([row.ids for _, row in kept])
            made.trains = np.concatenate([row.trains for _, row in kept])
            made.lengths = np.array([len(row.ids) for _, row in kept], np.int64)
            made.index = np.array([number for number, _ in kept], np.int64)
        return made

    def _parts(self, row: Tokens) -> list[Tokens]:
        """Return the row within the context: cut, or in parts that begin with what the tokenizer adds first and the
        last token of the part before it, so that every token is learnt once."""
        size = self.context_length
        if not self.split or len(row.ids) <= size:
            cut = Tokens(row.ids[:size], row.trains[:size])
            return [cut] if cut.trains.any() else []
        start = self.encoder.start if len(self.encoder.start) < size - 1 else []
        parts, done = [Tokens(row.ids[:size], row.trains[:size])], size
        lead = np.array(start, np.int32)
        while done < len(row.ids):
            more = size - len(start) - 1
            ids = np.concatenate([lead, row.ids[done - 1 : done + more]])
            trains = np.concatenate([np.zeros(len(start) + 1, np.bool_), row.trains[done : done + more]])
            parts.append(Tokens(ids, trains))
            done += more
        return [part for part in parts if part.trains.any()]


def tokenize(work: Work, rows: Iterator[Placed], progress: bool) -> list[Chunk]:
    """Tokenize all rows, on all cores where there are many. Raises UserError for the first bad row of all."""
    cores = usable_cores(psutil.cpu_count(logical=False))
    beginning = list(islice(rows, MANY))
    chunks = _numbered(chain(beginning, rows), CHUNK)
    parallel = len(beginning) == MANY and cores > 1 and "fork" in multiprocessing.get_all_start_methods()
    done = _on_all_cores(work, chunks, cores) if parallel else (work.chunk(*chunk) for chunk in chunks)
    with _Bar(progress) as bar:
        return [bar.count(chunk) for chunk in done]


def _numbered(items: Iterable[T], size: int) -> Iterator[tuple[int, list[T]]]:
    iterator, first = iter(items), 0
    while chunk := list(islice(iterator, size)):
        yield first, chunk
        first += len(chunk)


_work: Work | None = None  # of a process that was forked to do it


def _chunk(chunk: tuple[int, list[Placed]]) -> Chunk:
    assert _work is not None
    return _work.chunk(*chunk)


def _begin(parent: int) -> None:
    """Leave signals to the parent of a forked process, and end with it however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with_parent = 1  # PR_SET_PDEATHSIG
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(with_parent, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _on_all_cores(work: Work, chunks: Iterator[tuple[int, list[Placed]]], cores: int) -> Iterator[Chunk]:
    """Yield chunks in order. Forked processes have the tokenizer and its template already, and share the memory."""
    global _work
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one thread, and its library needs no warning
    _work = work
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), _begin, (os.getpid(),))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_chunk, chunk))
            while len(waiting) > 4 * cores or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingStopped(
            "a process that tokenized rows was ended by the system, most likely for want of host memory (see `dmesg`)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _work = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Bar:
    """Progress of tokenizing: a bar on a terminal, else a line now and then; nothing where it is quickly done."""

    def __init__(self, shown: bool):
        self.shown, self.rows = shown, 0
        self.started = self.told = time.monotonic()
        self.bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> "_Bar":
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(desc="tokenizing", unit=" rows", leave=False, delay=BAR_AFTER_SECONDS, dynamic_ncols=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def count(self, chunk: Chunk) -> Chunk:
        self.rows += chunk.n_read
        if self.bar is not None:
            self.bar.update(chunk.n_read)
        elif self.shown and time.monotonic() - self.told > LINE_EVERY_SECONDS:
            self.told = time.monotonic()
            print(f"tokenizing: {self.rows:,} rows in {self.told - self.started:.0f} s", flush=True)
        return chunk
