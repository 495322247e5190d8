"""Reading of a kept base: this program's rate beside the disk's own, cold and from the system's memory.

    python -m benchmarks.base_cache --folder FOLDER [--gib 8] [--threads 16] [--repeats 3] [--out rows.jsonl]

writes units of random bytes into FOLDER, which should be on the disk that base_cache is to be on, and reads them

- as the disk can: O_DIRECT, the same threads and sizes, no checks, nothing else: the disk's own rate;
- as a start does: through `Lanes`, each piece checked, into host memory on pages of its own as the shared copy is, and
  on a machine with a GPU to its memory too.

Files are dropped from the system's memory before each reading but the warm ones. The ways take turns, and the medians
count. A disk that is slower than its controller's or its host's memory gives its own rate only where FOLDER's files are
larger than that: take more GiB.
"""

import argparse
import json
import mmap
import os
import resource
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import environment
from fsdp_qlora.memory.pinned import large_pages, populate
from fsdp_qlora.units import GIB
from fsdp_qlora.weights.base_cache.lanes import MOST, Lanes, results
from fsdp_qlora.weights.base_cache.unit_file import BLOCK, PIECE, Reading, Writing, read_contents
from fsdp_qlora.weights.frozen_bytes import checksum

UNIT = 441_000_192  # bytes of a block at 70B, about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=MOST)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines file that the row is appended to")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        row = measure(Path(place), max(1, round(asked.gib * GIB / UNIT)), asked.threads, asked.repeats)
    row = {"benchmark": "base_cache", "unit": "GB/s", **row, **environment()}
    print(json.dumps(row, indent=1))
    if asked.out is not None:
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


def measure(place: Path, count: int, threads: int, repeats: int) -> dict[str, object]:
    """Return GB/s by way."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    files, nbytes = [place / f"{i}.safetensors" for i in range(count)], count * UNIT
    whole = torch.randint(-(2**62), 2**62, (UNIT // 8,)).view(torch.uint8).to(device)
    write_seconds = timed(lambda: write(files, whole, threads))
    host = large_pages(UNIT)
    populate(host.data_ptr(), UNIT)
    ways: dict[str, Callable[[], object]] = {
        "disk": lambda: read_bare(files, threads),
        "host": lambda: read(files, host, threads, torch.device("cpu")),
    }
    if device.type == "cuda":
        ways["gpu"] = lambda: read(files, whole, threads, device)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    turns = list(ways)
    for _ in range(repeats):
        turns = [*turns[1:], turns[0]]  # what a disk or its host remembers of the way before is not always for the same
        for way in turns:
            for file in files:
                forget(file)
            seconds[way].append(timed(ways[way]))
    rates = {way: nbytes / statistics.median(taken) / 1e9 for way, taken in seconds.items()}
    for file in files:  # now in the system's memory
        file.read_bytes()
    warm = {f"{way} warm": nbytes / timed(run) / 1e9 for way, run in ways.items() if way != "disk"}
    piece = os.urandom(PIECE)
    crc = statistics.median(timed(lambda: zlib.crc32(piece)) for _ in range(50))
    return {
        "gib": nbytes / GIB,
        "threads": threads,
        "write, fsync included": nbytes / write_seconds / 1e9,
        **rates,
        **{f"{way} of disk": rate / rates["disk"] for way, rate in rates.items() if way != "disk"},
        **warm,
        "crc32 of one core": PIECE / crc / 1e9,
        "rates of each time": {way: [nbytes / taken / 1e9 for taken in times] for way, times in seconds.items()},
        "most host memory, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def write(files: list[Path], whole: torch.Tensor, threads: int) -> None:
    total = checksum(whole)
    with Lanes(threads, whole.device) as lanes:
        for file in files:
            writing = Writing(file, file.stem, "digest", UNIT, total)
            lanes.store(writing, whole, UNIT)
            writing.finish()


def read(files: list[Path], memory: torch.Tensor, threads: int, device: torch.device) -> None:
    """Read all files as a start does, the next one begun before the last has come."""
    with Lanes(threads, device) as lanes:
        coming = []
        for file in files:
            reading = Reading(file, read_contents(file, "digest"))
            coming.append((reading, lanes.fetch(reading, memory, 0)))
            if len(coming) > 1:
                finish(*coming.pop(0))
        finish(*coming.pop(0))


def finish(reading: Reading, pieces: list[Any]) -> None:
    results(pieces)
    reading.close()


def read_bare(files: list[Path], threads: int) -> None:
    """Read all files as the disk can, into one buffer of each thread."""
    local = threading.local()

    def read_piece(descriptor: int, offset: int) -> None:
        if not hasattr(local, "memory"):
            local.memory = mmap.mmap(-1, PIECE)
        os.preadv(descriptor, [local.memory], offset)

    with ThreadPoolExecutor(threads) as pool:
        for_all = [(open_direct(file), file.stat().st_size) for file in files]
        pieces = [pool.submit(read_piece, file, at) for file, size in for_all for at in range(0, size - BLOCK, PIECE)]
        for piece in pieces:
            piece.result()
    for file, _ in for_all:
        os.close(file)


def open_direct(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(file, os.O_RDONLY)


def forget(file: Path) -> None:
    """Make the system drop a file from its memory."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
