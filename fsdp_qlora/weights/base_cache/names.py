"""Names of the files that an entry of the cache may hold. Only files of these names are ever removed."""

import os
import re

NOTE = "base.json"
SUFFIX = ".safetensors"  # of a unit's file
PART = ".part-"  # begins the name of a file that is being written
HOME = ".home-"  # begins the name of the mark by which ranks find out who shares a folder
USED = "used."  # begins the name of a user's mark: its time is that of the user's last run over the entry
FULL = "full."  # begins the name of a user's note that the disk has refused the entry

ENTRY = re.compile(r"[0-9a-f]{32}")  # of an entry's folder
_OURS = re.compile(
    rf"{re.escape(NOTE)}|\.{re.escape(NOTE)}\.\d+|[0-9a-f]{{32}}{re.escape(SUFFIX)}|{re.escape(PART)}[\w.-]+"
    rf"|{re.escape(HOME)}\d+-\d+|{re.escape(USED)}\d+|\.?{re.escape(FULL)}\d+(\.\d+)?"
)


def is_ours(name: str) -> bool:
    """Return whether a file of that name in an entry's folder is this program's."""
    return _OURS.fullmatch(name) is not None


def used_mark() -> str:
    return f"{USED}{os.getuid()}"


def full_mark() -> str:
    return f"{FULL}{os.getuid()}"
