"""Standard output and error that outlive their reader: a run is worth more than what it prints."""

import io
import os
import sys
from typing import Any, TextIO


class Outliving:
    """A text stream that falls silent where the terminal, the connection or the pipe behind it is gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        """Write, or do nothing once the reader has gone."""
        if not self._gone:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):  # ValueError: closed
                self._gone = True
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once the reader has gone."""
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Let nothing printed end the run: neither a letter that the terminal's encoding lacks nor a reader that leaves."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Outliving(sys.stdout), Outliving(sys.stderr)


def print_to_pager(text: str) -> None:
    """Print, and stay silent where the reader (`| head`) has gone before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
