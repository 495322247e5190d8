"""What this machine can do, measured once for the shapes of a run: in one to two seconds, kept for the next start."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.calibrate.attention import attention, forms_of
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.runtime.files import user_cache

VERSION = 5  # of how rates are measured: others' files are measured again
SLOWER_IS_MORE = {"crowding", "launch"}  # of all other rates the slowest rank has the least
NAMES = [field.name for field in fields(Rates)]


def calibrate(facts: Facts, model: CausalModel, world: World) -> Rates | None:
    """The rates, the same numbers on every rank; None without a GPU. A collective.

    model: assembled and fused, its weights not yet loaded. Measured again where any rank finds no file of this card,
    driver, PyTorch, group of ranks and shape."""
    if world.device.type != "cuda":
        return None
    file = cache_file(key_of(facts, model, world))
    mine = read(file)
    known = min(found[0] for found in world.gather([float(mine is not None)])) == 1
    mine = mine if known and mine is not None else _measure(facts, model, world)
    torch.cuda.reset_peak_memory_stats(world.device)  # what a run reports as its peak is its own
    agreed = slowest(world.gather([getattr(mine, name) for name in NAMES]))
    if not known:
        write(file, agreed)  # every rank does, whole or not at all: the file's name depends on its card
    return agreed


def slowest(by_rank: Sequence[Sequence[float]]) -> Rates:
    """Of each rate what the slowest rank has. by_rank: the fields of `Rates` in order, for each rank."""
    columns = zip(NAMES, zip(*by_rank, strict=True), strict=True)
    return Rates(**{name: max(column) if name in SLOWER_IS_MORE else min(column) for name, column in columns})


def key_of(facts: Facts, model: CausalModel, world: World) -> dict[str, Any]:
    """All that rates depend on."""
    shape = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "codec", "fused", "multiprocessors", "flat")
    block = ("adapter", "lora_rank", "dropout", "has_output_norms", "has_head_norms")  # what the host has to launch
    forms = forms_of(model, facts, world.device)
    attention = [[*form.masking[1:], form.backend, count] for form, count in sorted(forms.items(), key=repr)]
    card = torch.cuda.get_device_properties(world.device)  # one of two alike may have fewer lanes, or a lower limit
    return {name: getattr(facts, name) for name in shape + block} | {
        "version": VERSION,
        "machine": platform.node(),
        "card": [card.name, str(getattr(card, "uuid", ""))],
        "torch": torch.__version__,
        "driver": _driver(),
        "ranks": world.size,
        "local_ranks": world.local_size,
        "peer_access": os.environ.get("NCCL_P2P_DISABLE", ""),
        "dtype": str(model.precision.compute),
        "attention": attention,
        "batch": facts.batch,
        "context": facts.context,
        "mean_tokens": facts.mean_tokens,
        "mean_row": facts.mean_row,
        "adapters": facts.adapter_parameters,
    }


def cache_file(key: dict[str, Any]) -> Path | None:
    """Where rates with that key are kept: in the user's cache folder; None for a user without a home."""
    folder = user_cache()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"rates-{digest}.json"


def read(file: Path | None) -> Rates | None:
    """What `write` left there, or None: a file that is damaged or of other fields is as none."""
    if file is None:
        return None
    try:
        values = json.loads(file.read_text())
        rates = Rates(**{name: float(values[name]) for name in NAMES})
    except (OSError, ValueError, KeyError, TypeError):  # ValueError: JSON's and Unicode's too
        return None
    return rates if rates.matmul_forward > 0 and rates.h2d > 0 and rates.copy > 0 else None


def write(file: Path | None, rates: Rates) -> None:
    """For the next start; where that cannot be, it is measured again then."""
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as part:
            part.write_text(json.dumps(asdict(rates), indent=1) + "\n")


def _measure(facts: Facts, model: CausalModel, world: World) -> Rates:
    # Only where there is something to measure: these need the blocks' own code.
    from fsdp_qlora.plan.calibrate import measure
    from fsdp_qlora.plan.calibrate.launches import launches

    dtype, device = model.precision.compute, world.device
    values = measure.products(facts, dtype, device)
    values |= attention(facts, forms_of(model, facts, device), dtype, device)
    values |= measure.memory(model, device)
    values |= measure.link(world)
    values |= measure.collectives(facts, dtype, world)
    values["launch"] = launches(model, facts, device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return Rates(**values)


def _driver() -> str:
    """The NVIDIA driver's version line, where the system tells it without being asked through a library."""
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return ""
