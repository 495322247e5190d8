"""What `--verbose true` adds to the start-up lines: the machine, what was measured of it, where the seconds went."""

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata

import psutil
import torch
import torch.distributed as dist

from fsdp_qlora.distributed.world import World
from fsdp_qlora.runtime.launcher import usable_cores
from fsdp_qlora.units import as_gib

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "flash_attn")


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


def machine_lines(world: World) -> list[str]:
    """Return lines on cards, host and versions of all ranks. A collective."""
    everyone: list[tuple[str, ...]] = [()] * world.size
    dist.all_gather_object(everyone, (_card(world), platform.node(), _host()))
    cards = _counted([card for card, _, _ in everyone])
    hosts = _counted([host for _, host in sorted({(node, host) for _, node, host in everyone})])
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES if _installed(name)]
    cuda = [f"CUDA {torch.version.cuda}"] if torch.version.cuda else []
    return [
        f"machine   {cards}; {hosts}",
        f"          Python {platform.python_version()}, {', '.join(versions + cuda)}",
    ]


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


def _card(world: World) -> str:
    if world.device.type != "cuda":
        return "no GPU"
    properties = torch.cuda.get_device_properties(world.device)
    return f"{properties.name} ({as_gib(properties.total_memory)})"


def _host() -> str:
    return f"{usable_cores(psutil.cpu_count())} cores, {as_gib(psutil.virtual_memory().total, 0)} of host memory"


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(names).items())


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
