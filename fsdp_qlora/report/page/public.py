"""Texts of options, paths and errors without what should not be passed on: secrets, names of users and of hosts."""

import getpass
import re
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

HIDDEN = "[hidden]"
NAMES = ("entity", "master_addr")  # options whose values are names: a user's, a host's
SHORTEST = 4  # letters of a host's name that is looked for: shorter ones are words

_RULES = (
    (re.compile(r"(?<=://)[^\s/@'\"]{1,300}@"), f"{HIDDEN}@"),  # user and password before a host
    (
        re.compile(
            r"(?i)([?&][^=&\s]{0,60}(?:token|key|secret|passw|sign|sig|credential|auth)[^=&\s]{0,60}=)[^&\s'\"]+"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(?:hf|gh[pousr]|github_pat|sk|api_org)[_-][\w-]{16,}"), HIDDEN),  # tokens by how they begin
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"), HIDDEN),  # addresses of machines
    (re.compile(r"/(home|Users)/[^/\s'\",:;)]+"), rf"/\1/{HIDDEN}"),
)
_NAMED = re.compile(rf"(?m)^([ #]*(?:{'|'.join(NAMES)}): *)(?!null\b)\S.*$")  # a line of a config.yaml


def public(said: str) -> str:
    """Return a text without them. The user's own home folder becomes ~."""
    for pattern, instead in (*_here(), *_RULES):
        said = pattern.sub(instead, said)
    return said


def public_options(file: str) -> str:
    """Return the text of a config.yaml without them."""
    return public(_NAMED.sub(rf"\1{HIDDEN}", file))


@cache
def _here() -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return what stands for names of this user and this machine."""
    found = []
    with suppress(RuntimeError):
        home = str(Path.home())
        if home != "/":
            found.append((re.compile(rf"{re.escape(home)}(?![^/\s'\",:;)])"), "~"))
    with suppress(OSError, KeyError):
        user = getpass.getuser()
        if user != "root":
            found.append((re.compile(rf"(?<=/){re.escape(user)}(?![^/\s'\",:;)])"), HIDDEN))
    host = socket.gethostname()
    if len(host) >= SHORTEST and host != "localhost":
        found.append((re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])"), HIDDEN))
    return tuple(found)
