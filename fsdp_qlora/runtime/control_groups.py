"""Limits of this process's control groups, of its own and of those above: what a container or a batch system allows.

Inside a container the root of the mount is its own group. Under SLURM or systemd there is no container: the process's
group is somewhere below the root, which has no limits. Versions 1 and 2 differ in the names of folders and files.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # beyond the second the system slows a process down
USED = ("memory.current", "memory.usage_in_bytes")
# Of memory.stat: pages of files, which the system takes back. Version 1 has the sums over a group's own groups apart.
CACHE = (("total_inactive_file", "total_active_file"), ("inactive_file", "active_file"))


def free_bytes() -> float:
    """Return the bytes that the groups' limits leave of host memory, the page cache counted as free; inf without any
    limit."""
    return min((max(0, left) for left in map(_left, _folders("memory")) if left is not None), default=float("inf"))


def most_bytes() -> float:
    """Return the host memory that the groups' limits allow altogether; inf without any limit."""
    return min((limit for limit in map(_limit, _folders("memory")) if limit is not None), default=float("inf"))


def cores() -> float:
    """Return the cores' worth of time that the groups' quotas allow; inf without any."""
    return min((quota for quota in map(_quota, _folders("cpu")) if quota is not None), default=float("inf"))


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups that `controller` may limit."""
    if sys.platform != "linux":
        return
    # A container may show its group at the mount's root, and name it by a path that only the host has.
    groups = {(ROOT, Path("/")), (ROOT / controller, Path("/"))}
    with suppress(OSError):
        for line in OWN.read_text(errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                groups |= {(ROOT, Path(path)), (ROOT / "unified", Path(path))}
            elif controller in controllers.split(","):
                groups |= {(ROOT / controllers, Path(path)), (ROOT / controller, Path(path))}
    found = {
        root / part.relative_to("/") for root, path in groups for part in (path, *path.parents) if path.is_absolute()
    }
    yield from (folder for folder in sorted(found) if ".." not in folder.parts and folder.is_dir())


def _limit(folder: Path) -> int | None:
    return min((limit for limit in (_number(folder / name) for name in LIMITS) if limit is not None), default=None)


def _left(folder: Path) -> int | None:
    limit = _limit(folder)
    used = next((used for used in (_number(folder / name) for name in USED) if used is not None), None)
    return None if limit is None or used is None else limit - used + _cache(folder)


def _cache(folder: Path) -> int:
    stat = dict[str, int]()
    with suppress(OSError, ValueError):
        stat = {name: int(number) for name, number in map(str.split, (folder / "memory.stat").read_text().splitlines())}
    return next((sum(stat[name] for name in names) for names in CACHE if all(name in stat for name in names)), 0)


def _quota(folder: Path) -> float | None:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    quota_us, period_us = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota_us / period_us if quota_us is not None and period_us and quota_us > 0 else None


def _number(file: Path) -> int | None:
    """Return the number in a file; None where it is not there or says "max"."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None
