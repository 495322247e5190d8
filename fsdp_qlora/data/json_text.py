"""JSON text of a file, decoded value by value: no more of it is held than the value that is being read."""

import io
import json
import re
from typing import IO, Any

from fsdp_qlora.errors import UserError, first_line

PIECE = 1 << 18  # characters that are read at a time, or as many as are held: a long value is decoded anew a few times
UNSURE = 64  # characters at the end of what is held in which a mistake may be a value cut in two
SPACE = re.compile(r"[ \t\r\n]*")


class JsonText:
    """Values and marks of a file, one after the other. Raises UserError with line and column for what is no JSON."""

    def __init__(self, file: IO[bytes], name: str, decoder: json.JSONDecoder):
        """Read a file of UTF-8, with or without a byte order mark. name: begins messages."""
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self.name, self.decoder = name, decoder
        self.held, self.at, self.has_more = "", 0, True
        self.line, self.counted = 1, 0  # the line of character `counted` of what is held
        self.column = 1  # of the first character that is held

    def skip(self, mark: str = "") -> bool:
        """Pass over space, `mark` if it follows, and space behind it. Return whether it did."""
        self._skip_space()
        if not mark or not self.held.startswith(mark, self.at):
            return False
        self.at += 1
        self._skip_space()
        return True

    def ended(self) -> bool:
        """Return whether nothing but space is left."""
        self._skip_space()
        return self.at == len(self.held)

    def value(self) -> Any:
        """Return the value that follows."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.held, self.at)
            except json.JSONDecodeError as error:
                sure = error.pos < len(self.held) - UNSURE and not error.msg.startswith("Unterminated string")
                if self.has_more and not sure:
                    self._read()
                    continue
                raise self.malformed(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a key given twice; brackets in brackets
                raise UserError(
                    f"{self.name}: line {self.next_line()}: malformed JSON ({first_line(error)})"
                ) from error
            if end < len(self.held) or not self.has_more:  # a number at the end may go on
                self.at = end
                return value
            self._read()

    def next_line(self) -> int:
        """Return the line of the next character."""
        self.line += self.held.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def malformed(self, why: str, at: int | None = None) -> UserError:
        """Return the mistake at a character that is held, from the next one on."""
        at = self.at if at is None else at
        line = self.next_line() + self.held.count("\n", self.at, at)
        return UserError(f"{self.name}: line {line}, column {self._column(at)}: malformed JSON ({why})")

    def _column(self, at: int) -> int:
        before = self.held.rfind("\n", 0, at)
        return at - before if before >= 0 else self.column + at

    def _skip_space(self) -> None:
        while True:
            space = SPACE.match(self.held, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.held) or not self.has_more:
                return
            self._read()

    def _read(self) -> None:
        self.next_line()
        self.column = self._column(self.at)
        self.held, self.at, self.counted = self.held[self.at :], 0, 0
        piece = self.file.read(max(PIECE, len(self.held)))
        self.held, self.has_more = self.held + piece, bool(piece)
