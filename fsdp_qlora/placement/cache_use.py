"""Whether a run uses the base cache, and for which base."""

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.runtime.files import cache_folder
from fsdp_qlora.runtime.launcher import usable_cores
from fsdp_qlora.units import GIB
from fsdp_qlora.weights.base_cache.disk import NOTHING_OWED, Owed, unfit_by_default
from fsdp_qlora.weights.base_cache.encoders import encoders_of, merged
from fsdp_qlora.weights.base_cache.entry import BASES
from fsdp_qlora.weights.base_cache.kept import KeptBase, UnitKey
from fsdp_qlora.weights.base_cache.lanes import LEAST, MOST
from fsdp_qlora.weights.codecs import is_quantized
from fsdp_qlora.weights.source import Weights

SMALL = GIB  # bytes of a base below which `auto` keeps none: there is little to gain


@dataclass(frozen=True)
class CacheUse:
    """The files of a run's base in the cache, and how they are read and written."""

    kept: KeptBase
    threads: int
    owed: Owed  # what the run writes later


def open_cache(
    options: ModelOptions, model: CausalModel, weights: Weights, world: World, owed: Owed = NOTHING_OWED
) -> CacheUse | None:
    """Return the use of the cache for a model that is about to be loaded; None where there is none. A collective.

    owed: what the run writes later. Raises UserError on every rank alike where the checkpoint cannot be read."""
    if options.base_cache is None or options.dummy_weights:
        return None
    if not _quantizes(model, weights):
        if options.base_cache != "auto":
            world.say("note      base_cache: this base is read as the checkpoint has it: there is nothing to keep")
        return None
    if options.base_cache == "auto" and sum(unit.frozen.layout.used for unit in model.units) < SMALL:
        return None
    folder = _folder(options.base_cache, world)
    if folder is None:
        return None
    content = world.together(weights.content)
    assert content is not None, "weights that are not made up have bytes"
    threads = min(MOST, max(LEAST, usable_cores(psutil.cpu_count(logical=False)) // world.local_size))
    units = {unit.name: UnitKey(unit.frozen.layout, _sources(unit, weights)) for unit in model.units}
    local = Path(options.model_name).is_dir()
    name = options.model_name if options.revision is None else f"{options.model_name}@{options.revision}"
    source = str(Path(options.model_name).resolve()) if local else name
    codecs = {entry.codec for unit in model.units for entry in unit.frozen.layout.entries.values()}
    mine = json.dumps(encoders_of(codecs, world.device))
    kept = KeptBase(folder, units, name, source, content, merged(map(json.loads, world.gather_texts(mine))))
    return CacheUse(kept, options.loading_workers if options.loading_workers > 0 else threads, owed)


def _folder(option: str, world: World) -> Path | None:
    """Return the cache's folder; None, and say why, where `auto` finds none for every rank. A collective."""
    folder = cache_folder(option, BASES)
    if option != "auto":
        return folder
    unfit = "the user has no home that may be read" if folder is None else unfit_by_default(folder)
    where = "" if folder is None or not unfit else f"{folder} "
    for line in world.gather_texts(where + unfit):
        if line:
            world.say(
                f"base_cache: not kept for the next start: {line}; set a folder on a disk of this machine, or null"
            )
            return None
    return folder


def _sources(unit: Unit, weights: Weights) -> dict[str, str]:
    """Return entry of the unit's layout -> its name in the checkpoint's files, or what else it is made from."""
    return unit.origins | {entry: weights.name_in_files(name) for entry, name in unit.sources.items()}


def _quantizes(model: CausalModel, weights: Weights) -> bool:
    """Return whether some of the base is encoded in a codec that the checkpoint does not have it in."""
    names = weights.names()
    return any(
        entry.codec.quantizes and not is_quantized(unit.sources.get(name, name), names)
        for unit in model.units
        for name, entry in unit.frozen.layout.entries.items()
    )
