"""What follows from shapes alone, kept between starts: rehearsals on the meta device, and what a search has found.

A file for each in the user's cache folder, under a digest of all that decides it: what the caller says, the sources of
this program, and the versions of the libraries that it runs on. Whoever has another of these finds nothing.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import fsdp_qlora
from fsdp_qlora.atomic_files import atomic_file, sweep
from fsdp_qlora.kernels.device import deterministic
from fsdp_qlora.runtime.files import user_cache

PREFIX, SUFFIX = "plan-", ".json"
MOST = 200  # files that are kept, those used last: some 50 KB each
LIBRARIES = ("torch", "transformers", "numpy", "triton", "flash_attn")

_is_on = False


@contextmanager
def remembering(on: bool = True) -> Iterator[None]:
    """Within it `remembered` reads and writes files; outside it computes."""
    global _is_on
    before, _is_on = _is_on, on
    try:
        yield
    finally:
        _is_on = before


def remembered(kind: str, key: Callable[[], Any], make: Callable[[], Any]) -> Any:
    """Return what `make` returned where kind, key and program were the same, or what it returns now.

    key: all that decides it, as JSON with `repr` for the rest. What is made is of what JSON has; a tuple may come back
    as a list."""
    folder = user_cache() if _is_on else None
    if folder is None or program() is None:
        return make()
    decides = json.dumps([kind, key(), deterministic(), program()], default=repr)
    file = folder / f"{PREFIX}{_digest(decides)[:24]}{SUFFIX}"
    text = _read(file, decides)
    if text is None:
        text = json.dumps(make(), separators=(",", ":"))
        _write(file, decides, text)
    return json.loads(text)


@cache
def program() -> str | None:
    """Return a digest of this program's sources and of the versions of what it runs on; None where a source is younger
    than this process, which may run what was there before."""
    return program_of(Path(fsdp_qlora.__file__).parent, psutil.Process().create_time())


def program_of(package: Path, started: float) -> str | None:
    """Return the same of a package in that folder and a process that started then, in seconds since 1970."""
    sources = _sources(package)
    if any(path.stat().st_mtime > started for path in sources):
        return None
    found = hashlib.sha256()
    for path in sources:
        found.update(f"{path.relative_to(package)}\n".encode())
        found.update(path.read_bytes())
    for name in LIBRARIES:
        found.update(f"{name} {_version(name)}\n".encode())
    found.update(platform.python_version().encode())
    return found.hexdigest()


def _sources(package: Path) -> list[Path]:
    """Return its files by name; kernels may be there by a link, which `rglob` does not follow."""
    folders = [Path(folder) for folder, _, _ in os.walk(package, followlinks=True)]
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def _version(name: str) -> str:
    with suppress(PackageNotFoundError):
        return version(name)
    return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _seal(decides: str, text: str) -> str:
    return _digest(f"{decides}\n{text}")


def _read(file: Path, decides: str) -> str | None:
    """Return what `_write` left there for the same, or None: a file that is damaged is as none."""
    try:
        seal, _, text = file.read_text().partition("\n")
    except (OSError, UnicodeError):
        return None
    if seal != _seal(decides, text):
        return None
    with suppress(OSError):
        os.utime(file)
    return text


def _write(file: Path, decides: str, text: str) -> None:
    """For the next start; where that cannot be, it is computed again then."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as part:
            part.write_text(f"{_seal(decides, text)}\n{text}")
        sweep(file.parent, lambda name: name.startswith(PREFIX), dead_only=True)
        _drop_oldest(file.parent)


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.glob(f"{PREFIX}*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MOST]:
        file.unlink(missing_ok=True)
