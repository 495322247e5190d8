"""Whether a run uses the base cache, and for which base."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.runtime.launcher import usable_cores
from fsdp_qlora.units import GIB
from fsdp_qlora.weights.base_cache.entry import cache_folder
from fsdp_qlora.weights.base_cache.kept import KeptBase, UnitKey
from fsdp_qlora.weights.base_cache.lanes import LEAST, MOST
from fsdp_qlora.weights.codecs import is_quantized
from fsdp_qlora.weights.source import Weights

SMALL = GIB  # bytes of a base below which `auto` keeps none: it is quantized in about a second


@dataclass(frozen=True)
class CacheUse:
    """The files of a run's base in the cache, and how they are read."""

    kept: KeptBase
    threads: int


def open_cache(options: ModelOptions, model: CausalModel, weights: Weights, world: World) -> CacheUse | None:
    """Return the use of the cache for a model that is about to be loaded; None where there is none. A collective.

    Raises UserError on every rank alike where the checkpoint cannot be read."""
    if options.base_cache is None or options.dummy_weights:
        return None
    if not _quantizes(model, weights):
        if options.base_cache != "auto":
            world.say("note      base_cache: this base is read as the checkpoint has it: there is nothing to keep")
        return None
    if options.base_cache == "auto" and sum(unit.frozen.layout.used for unit in model.units) < SMALL:
        return None
    folder = cache_folder(options.base_cache)
    if min(number for (number,) in world.gather([float(folder is not None)])) == 0 or folder is None:
        world.say("base_cache: not kept for the next start: the user has no home; set a folder that every rank sees")
        return None
    content = world.together(weights.content)
    assert content is not None, "weights that are not made up have bytes"
    threads = min(MOST, max(LEAST, usable_cores(psutil.cpu_count(logical=False)) // world.local_size))
    units = {unit.name: UnitKey(unit.frozen.layout, unit.origins) for unit in model.units}
    local = Path(options.model_name).is_dir()
    name = options.model_name if options.revision is None else f"{options.model_name}@{options.revision}"
    source = str(Path(options.model_name).resolve()) if local else name
    kept = KeptBase(folder, units, name, source, content, world.device.type)
    return CacheUse(kept, options.loading_workers if options.loading_workers > 0 else threads)


def _quantizes(model: CausalModel, weights: Weights) -> bool:
    """Return whether some of the base is encoded in a codec that the checkpoint does not have it in."""
    names = weights.names()
    return any(
        entry.codec.quantizes and not is_quantized(unit.sources.get(name, name), names)
        for unit in model.units
        for name, entry in unit.frozen.layout.entries.items()
    )
