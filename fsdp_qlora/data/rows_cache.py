"""Tokenized rows kept on disk by content: the node's other ranks and the next run map them instead of tokenizing."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data.sources import Source
from fsdp_qlora.runtime.files import cache_folder

ARRAYS = ("ids", "trains", "offsets", "index")
NOTE = "rows.json"
PART = ".rows-"  # begins the name of an entry that is being written
ENTRY = re.compile(r"[0-9a-f]{32}")
KEPT_DAYS = 30  # after which an entry that nobody has read is removed
MANY_ROWS, MANY_TOKENS = 2048, 500_000  # fewer are tokenized again in no time
# What decides how rows become tokens; dataset stands for its content, the rest has its effect later.
OPTIONS = (
    "dataset_format", "columns", "context_length", "text_overflow", "train_on_prompt", "bad_rows",
)  # fmt: skip
SOURCES = (
    "chat", "folders", "forms", "json_files", "json_text", "marked_turns", "marks", "messages", "packed", "prompts",
    "readers", "row_set", "rows", "rows_cache", "sources", "stand_ins", "templates", "tokenizing", "tokens",
    "turn_edges", "turns",
)  # fmt: skip
PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets")


class Cache:
    """The place of one dataset's rows, tokenized with one tokenizer and these options."""

    def __init__(
        self, options: DataOptions, tokenizer: PreTrainedTokenizerBase, source: Source, samples: int | None, prompt: str
    ):
        """Find the rows' folder. samples: rows taken of the source. prompt: the text of --prompt_template, or ''."""
        self.notes: list[str] = []
        self.path: Path | None = None
        folder = cache_folder(options.rows_cache, "rows")
        if folder is not None:
            key = _key(options, tokenizer, source, [str(samples), prompt])
            self.path = folder / key if key else None

    def load(self) -> dict[str, Any] | None:
        """Return the fields of Rows that were saved, their arrays mapped from the disk; None where there are none."""
        if self.path is None or not os.path.isfile(self.path / NOTE):  # nor where its folder may not be entered
            return None
        try:
            held: dict[str, Any] = json.loads((self.path / NOTE).read_text())
            checks = held.pop("checks")
            for name in ARRAYS:
                held[name] = np.load(self.path / f"{name}.npy", mmap_mode="r")
                if _check(held[name]) != checks[name]:
                    raise ValueError(name)
            os.utime(self.path / NOTE)
        except (OSError, ValueError, KeyError):  # removed by another process, cut short or spoiled by the disk
            shutil.rmtree(self.path, ignore_errors=True)  # or nothing whole would ever take its place
            return None
        self.notes.append(f"tokenized before, read from {self.path}")
        return held

    def save(self, held: dict[str, Any]) -> None:
        """Keep rows for others, whole or not at all. A full or read-only disk is no fault: it is noted."""
        if self.path is None or (len(held["index"]) < MANY_ROWS and len(held["ids"]) < MANY_TOKENS):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=PART, dir=self.path.parent))
        except OSError as error:
            self.notes.append(f"not kept in rows_cache {self.path.parent} ({error.strerror})")
            return
        try:
            for name in ARRAYS:
                np.save(part / f"{name}.npy", held[name])
            note = {name: value for name, value in held.items() if name not in ARRAYS}
            note["checks"] = {name: _check(held[name]) for name in ARRAYS}
            (part / NOTE).write_text(json.dumps(note))
            with suppress(OSError):  # another run has put the same there
                part.rename(self.path)
        except OSError as error:
            self.notes.append(f"not kept in rows_cache {self.path.parent} ({error.strerror})")
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _remove_old(self.path.parent)


def _check(values: npt.NDArray[Any]) -> list[int]:
    """Return (elements, CRC-32 of their bytes): 0.1 s for 100 M tokens, less than their digest takes at start."""
    return [len(values), zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data)]


def _remove_old(folder: Path) -> None:
    """Remove entries that no run has read for long, whole or begun; what else a folder of the user's holds stays."""
    oldest = time.time() - KEPT_DAYS * 86400
    for entry in folder.iterdir():
        with suppress(OSError):
            whole = ENTRY.fullmatch(entry.name) and (entry / NOTE).is_file()
            if not whole and not entry.name.startswith(PART):
                continue
            if (entry / NOTE if whole else entry).stat().st_mtime < oldest:
                shutil.rmtree(entry, ignore_errors=True)


def _key(options: DataOptions, tokenizer: PreTrainedTokenizerBase, source: Source, more: list[str]) -> str:
    """Return a hash of all that decides the tokens; '' where something does that cannot be known, such as the date."""
    template = tokenizer.chat_template
    template = json.dumps(template, sort_keys=True) if template else ""
    if not tokenizer.is_fast or "strftime_now" in template:
        return ""
    content = source.content()
    if not content:
        return ""
    total = hashlib.blake2b(digest_size=16)
    here = Path(__file__).parent
    parts = [
        content,
        source.form,
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True),
        template,
        json.dumps({name: getattr(options, name) for name in OPTIONS}),
        *(f"{name} {_version(name)}" for name in PACKAGES),
        *((here / f"{name}.py").read_text() for name in SOURCES),
    ]
    for part in [*parts, *more]:
        total.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return total.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
