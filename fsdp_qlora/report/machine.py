"""What a run runs on, for its record and for `--verbose true`, which also says where the seconds before a step went."""

import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from fsdp_qlora.distributed.world import World
from fsdp_qlora.runtime.launcher import usable_cores
from fsdp_qlora.units import as_gib

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "hqq", "flash_attn")
ROOT = Path(__file__).resolve().parents[2]  # of a checkout; what packages are in, where this one is installed
DRIVER = Path("/proc/driver/nvidia/version")
GIT_SECONDS = 5.0  # that a slow disk may take to tell the commit


class Stages:
    """Seconds of what a run does before its first step, from the start of the process on."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self._seconds: dict[str, float] = {}

    def done(self, name: str) -> None:
        """End the stage `name`, which began when the one before ended."""
        now = time.time()
        self._seconds[name] = now - self._last
        self._last = now

    def line(self) -> str:
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"started   in {sum(self._seconds.values()):.1f} s: {told}"


def environment(world: World) -> dict[str, Any]:
    """Return versions, cards and hosts of all ranks, as JSON has them. A collective.

    gpus: of each rank, none on the CPU. hosts: of each node, without its name."""
    everyone: list[tuple[str, dict[str, Any] | None, dict[str, Any]]] = [("", None, {})] * world.size
    dist.all_gather_object(everyone, (platform.node(), _card(world), _host()))
    return {
        "program": _version("fsdp-qlora"),
        "commit": _commit() if world.is_main else None,
        "versions": {"python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name)) is not None}
        | ({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "ranks": world.size,
        "gpus": [card for _, card, _ in everyone if card is not None],
        "hosts": list({node: host for node, _, host in everyone}.values()),
    }


def machine_lines(of: Mapping[str, Any]) -> list[str]:
    """Return lines on cards, hosts and versions. of: the `environment`."""
    cards = _counted([f"{card['name']} ({as_gib(card['memory_bytes'])})" for card in of["gpus"]]) or "no GPU"
    hosts = _counted(
        [f"{host['cores']} cores, {as_gib(host['memory_bytes'], 0)} of host memory" for host in of["hosts"]]
    )
    versions = dict(of["versions"])
    python, cuda = versions.pop("python"), versions.pop("cuda", None)
    told = [f"{name} {version}" for name, version in versions.items()] + ([f"CUDA {cuda}"] if cuda else [])
    return [f"machine   {cards}; {hosts}", f"          Python {python}, {', '.join(told)}"]


def rates_line(rates: Mapping[str, float], said: str = "") -> str:
    """Return `plan.clock.Rates` in the units of data sheets. said: of them, before all else."""

    def pair(first: str, second: str, unit: float) -> str:
        return f"{rates[first] / unit:,.0f} / {rates[second] / unit:,.0f}"

    ranks = (
        f"; between ranks gather / reduce {pair('gather', 'reduce', 1e9)}, products beside it x {rates['crowding']:.2f}"
    )
    return (
        f"rates     {said}products {pair('matmul_forward', 'matmul_backward', 1e12)} TFLOP/s forward / backward, "
        f"attention {pair('attention_forward', 'attention_backward', 1e12)}; device memory {rates['copy'] / 1e9:,.0f} "
        f"GB/s, decoding {rates['dequantize'] / 1e9:,.0f}; to the GPU {rates['h2d'] / 1e9:.1f} GB/s, both ways "
        f"{rates['h2d_both'] / 1e9:.1f} / {rates['d2h_both'] / 1e9:.1f}{ranks if rates['gather'] else ''}; a launch "
        f"{rates['launch'] * 1e6:.0f} us"
    )


def _card(world: World) -> dict[str, Any] | None:
    if world.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(world.device)
    return {"name": properties.name, "memory_bytes": properties.total_memory}


def _host() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cores": usable_cores(psutil.cpu_count()),
        "memory_bytes": psutil.virtual_memory().total,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, where there is one."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text().partition("\n")[0])
    except OSError:
        return None
    return None if found is None else found[0]


def _commit() -> str | None:
    """Return the commit of this checkout, with `+changes` where files differ from it; None of what is installed."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        done = subprocess.run(
            command, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}, capture_output=True, text=True, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(names).items())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
