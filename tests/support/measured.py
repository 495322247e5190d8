"""A command in a process of its own, with the seconds and the memory that it took."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAUSE = 0.01  # seconds between two looks at the process
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measured:
    """What a command took, on Linux.

    resident_bytes: the most that was resident at once, mapped pages of files and libraries included. anonymous_bytes:
    the most of it that is no file's, as seen every PAUSE."""

    code: int
    said: str
    seconds: float
    cpu_seconds: float
    resident_bytes: int
    anonymous_bytes: int


def run_measured(arguments: Sequence[object], environ: Mapping[str, str] | None = None) -> Measured:
    """Run Python with these arguments and wait for its end, whatever its exit code. environ: variables to add."""
    start, before = time.perf_counter(), _cpu_seconds_of_children()
    peaks = {"VmHWM": 0, "RssAnon": 0}  # not ru_maxrss, which begins with the parent's own
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environ or {})}, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            for name, nbytes in _memory(process.pid).items():
                peaks[name] = max(peaks[name], nbytes)
            time.sleep(PAUSE)
        seconds = time.perf_counter() - start
        output.seek(0)
        said = output.read().decode(errors="replace")
    cpu_seconds = _cpu_seconds_of_children() - before
    return Measured(process.returncode, said, seconds, cpu_seconds, peaks["VmHWM"], peaks["RssAnon"])


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(pid: int) -> dict[str, int]:
    """Return bytes of VmHWM and RssAnon; nothing once the process is gone."""
    found = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "RssAnon"):
                found[name] = int(value.split()[0]) * 1024
    return found
