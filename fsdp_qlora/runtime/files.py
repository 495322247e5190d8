"""Files and folders that a run writes: one line where they cannot be written, the output folder taken by one run."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from fsdp_qlora.errors import UserError

LOCK = ".run.lock"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing_to(folder: Path, option: str) -> Iterator[None]:
    """Make `folder`, the value of `option`, where it is missing. Raises UserError where it, or the block, cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        advice = "free some space or choose another folder" if error.errno in NO_ROOM else "choose another folder"
        raise UserError(f"{option}: {folder} cannot be written ({error.strerror}); {advice}") from error


def check_writable(folder: Path, option: str, name: str = "") -> None:
    """Make `folder` and prove that it can be written, and its file of that name where there is one.

    Raises UserError where not. option: that leads there."""
    with writing_to(folder, option):
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
        if name and (folder / name).exists():
            (folder / name).open("ab").close()


def check_empty(folder: Path) -> None:
    """Raise UserError where `output_dir` has anything in it."""
    names = [file.name for file in folder.iterdir() if file.name != LOCK]
    if names:
        resume = ", --resume auto to go on from its last checkpoint" * any(n.startswith("checkpoint-") for n in names)
        raise UserError(
            f"output_dir: {folder} is not empty; choose another folder{resume}, or --overwrite_output_dir true "
            "to replace what an earlier run left there"
        )


def check_elsewhere(folder: Path, sources: Iterable[tuple[str, Path]]) -> None:
    """Raise UserError where `output_dir` is a folder that is read. sources: what each is, and where it is."""
    for what, source in sources:
        if source.is_dir() and folder.resolve() == source.resolve():
            raise UserError(
                f"output_dir: {folder} is the folder of the {what}, whose files would be replaced; "
                "choose another folder"
            )


def user_cache() -> Path | None:
    """Return this program's folder for what any run can make again: in $XDG_CACHE_HOME, or ~/.cache.

    None for a user without a home: neither $HOME nor an entry in passwd, or another user's $HOME, as in containers
    under a number of their own."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fsdp_qlora"
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()  # `exists` hides from Python 3.14 on that it may not be looked at
    except (RuntimeError, OSError):
        return None
    return folder


def cache_folder(option: str | None, part: str) -> Path | None:
    """Return the folder that an option of a cache means: of that part of the user's cache where it is auto.

    None where it is null, or auto of a user without a home."""
    if option is None:
        return None
    if option != "auto":
        return Path(option)
    folder = user_cache()
    return None if folder is None else folder / part


def taken(folder: Path) -> Literal["", "here", "elsewhere"]:
    """Return on which machine a run has an output folder; "" where none has, as far as can be told from here.

    "elsewhere": or it was killed there. Takes no lock, which a run that is just starting would meet."""
    path = folder / LOCK
    try:
        said, lock = path.read_text(errors="replace").strip(), f":{path.stat().st_ino} "
        is_held = any(" FLOCK " in line and lock in line for line in Path("/proc/locks").read_text().splitlines())
    except OSError:
        return ""
    if is_held:
        return "here"
    return "elsewhere" if said and not said.endswith(f" on {socket.gethostname()}") else ""


class Claim:
    """The output folder, taken by one run at a time from the moment it is checked; a context manager gives it back.

    The lock is the system's: it ends with the process, however."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._path: Path | None = None

    def take(self, folder: Path, overwrite: bool) -> None:
        """Make `output_dir`, take it and prove that it can be written.

        Raises UserError where it cannot, is not empty, or is another run's that is still going on."""
        with writing_to(folder, "output_dir"):
            self._lock(folder)
            if not overwrite:
                check_empty(folder)
        check_writable(folder, "output_dir")

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None and self._path is not None:
            with suppress(OSError):
                self._path.unlink()
            os.close(self._file)
            self._file = None

    def _lock(self, folder: Path) -> None:
        path = folder / LOCK
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 200).decode(errors="replace").strip()
                os.close(file)
                raise UserError(
                    f"output_dir: {folder} is taken by another run ({holder or 'just started'}); choose another folder"
                ) from None
            except OSError:
                pass  # a file system without locks: two runs at once are not seen there
            with suppress(OSError):
                if os.stat(path).st_ino == os.fstat(file).st_ino:
                    break
            os.close(file)  # the run that held it has just removed it
        self._file, self._path = file, path
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
