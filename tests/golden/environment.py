"""Describe what decides the bits of a run beside the code: versions and the CPU."""

import platform
from pathlib import Path

import torch
import transformers

VECTOR_SETS = ("amx", "avx", "fma")  # of x86
CPUINFO = Path("/proc/cpuinfo")


def environment() -> dict[str, str]:
    """Return what two machines must have in common to train the same bits on their CPUs."""
    facts = _cpu_facts()
    named = f"{facts.get('model name', platform.processor() or platform.machine())}"
    numbers = [facts[key] for key in ("cpu family", "model") if key in facts]
    sets = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(VECTOR_SETS))
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": " ".join([named, "/".join(numbers)]).strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": " ".join(sets),
    }


def _cpu_facts() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo; nothing where there is none."""
    if not CPUINFO.is_file():
        return {}
    first = CPUINFO.read_text().split("\n\n")[0]
    pairs = [line.split(":", 1) for line in first.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}
