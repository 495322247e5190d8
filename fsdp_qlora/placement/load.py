"""Loading of a model's frozen bytes, unit by unit: read and encoded by one rank, broadcast to all, then placed.

Never more than a few units are in flight, so the peak of host memory is the placement's own plus a few blocks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.dora import row_norms
from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement.base import Placement
from fsdp_qlora.placement.cache_use import CacheUse
from fsdp_qlora.placement.from_cache import place_kept
from fsdp_qlora.placement.norms import SeenNorms
from fsdp_qlora.placement.to_cache import Keeper
from fsdp_qlora.weights.base_cache.lanes import Lanes
from fsdp_qlora.weights.codecs import Parts, all_finite, companions, is_quantized, stored_codec
from fsdp_qlora.weights.frozen_bytes import checksum
from fsdp_qlora.weights.layout import Entry
from fsdp_qlora.weights.source import Shape, Weights


def expected_tensors(unit: Unit, weights: Weights) -> dict[str, Shape]:
    """Return checkpoint name -> shape of what `unit` is made from; a quantized weight's companions included."""
    expected = dict[str, Shape]()
    for entry, source in unit.sources.items():
        expected |= expected_of(source, unit.frozen.layout.entries[entry].shape, weights)
    return expected


def expected_of(source: str, shape: tuple[int, ...], weights: Weights) -> dict[str, Shape]:
    """Return checkpoint name -> shape of what one weight is made from; its companions where it is quantized."""
    names = weights.names()
    if names is None or not is_quantized(source, names):
        return {source: shape}
    # Checked by the codec when read.
    return {name: None for name in (source, *companions(source)) if name in names}


def check_names(model: CausalModel, weights: Weights) -> None:
    """Raise UserError, before anything is read, naming tensors that are missing or of another shape."""
    weights.check({name: shape for unit in model.units for name, shape in expected_tensors(unit, weights).items()})


def load(
    model: CausalModel, weights: Weights, placement: Placement, world: World, cache: CacheUse | None = None
) -> dict[str, Tensor]:
    """Place every unit: from the base cache where it has the unit, else read and encoded, and kept there. A collective.

    cache: None: there is none for this base. Returns, of each linear whose norms by rows are stored with it: its path
    -> these norms [O], on the CPU."""
    left, start, said, seen = list(model.units), time.perf_counter(), "", SeenNorms()
    bar = tqdm(total=len(left), desc="loading", unit="block", disable=None if world.is_main else True, leave=False)
    if cache is None:
        encode_units(left, weights, placement, world, bar.update, seen)
    else:
        with Lanes(cache.threads, world.device) as lanes:
            left, damaged = place_kept(left, cache.kept, placement, lanes, world, bar.update, seen)
            tidied = cache.kept.tidy() if world.local_rank == 0 else ""
            for line in dict.fromkeys(line for line in world.gather_texts(tidied) if line):
                world.say(line)
            if left:
                with Keeper(left, damaged, cache, weights, lanes, world) as keeper:
                    encode_units(left, weights, placement, world, bar.update, seen, keeper)
                    said = keeper.end()
            if len(left) < len(model.units):
                said = f"{len(model.units) - len(left)} of {len(model.units)} units from {cache.kept.folder}" + (
                    f", {said}" if said else ""
                )
    bar.close()
    placement.finish()
    world.say(f"loaded    in {time.perf_counter() - start:.0f} s" + (f": {said}" if said else ""))
    return seen.by_linear


def encode_units(
    units: Sequence[Unit],
    weights: Weights,
    placement: Placement,
    world: World,
    done: Callable[[], object],
    seen: SeenNorms,
    keeper: Keeper | None = None,
) -> None:
    """Read, encode and place units. A collective: each rank encodes every n-th unit, all at the same time."""
    own = units[world.rank :: world.size]
    with ThreadPoolExecutor(1) as prefetch:
        reading = [prefetch.submit(_read, own[0], weights, world.device)] if own else []

        def next_encoded(turn: int) -> Tensor | None:
            if turn >= len(own):
                return None
            tensors = reading.pop().result()
            if turn + 1 < len(own):  # the disk reads while this rank encodes and broadcasts
                reading.append(prefetch.submit(_read, own[turn + 1], weights, world.device))
            return encode(own[turn], tensors, world.device)

        for turn, first in enumerate(range(0, len(units), world.size)):
            encoded = world.together(partial(next_encoded, turn))
            for source, unit in enumerate(units[first : first + world.size]):
                whole = _broadcast(unit, encoded if source == world.rank else None, source, world)
                unit.frozen.expected = checksum(whole)
                seen.take(unit, whole)
                world.together(partial(placement.store, unit, whole))
                if keeper is not None:
                    keeper.received(unit, whole, source)
                done()
            if keeper is not None and encoded is not None:
                keeper.encoded(own[turn], encoded)
            del encoded


def encode(unit: Unit, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Return the unit's bytes, uint8 [nbytes] on `device`, from the checkpoint's tensors."""
    layout = unit.frozen.layout
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    for entry, source in unit.sources.items():
        layout.write(buffer, entry, encode_entry(layout.entries[entry], source, tensors, device))
    views = layout.views(buffer) if unit.norms else {}
    for entry, (weight, dtype) in unit.norms.items():
        form = layout.entries[weight]
        decoded = form.codec.decode(views[weight], form.shape, dtype)
        layout.write(buffer, entry, {"values": row_norms(decoded)})
    return buffer


def encode_entry(form: Entry, source: str, tensors: Mapping[str, Tensor], device: torch.device) -> Parts:
    """Return one entry's parts on `device`, from the checkpoint's tensors of that name."""
    stored = stored_codec(source, tensors)
    if stored is not None:
        # On the device already: HQQ's codes are packed anew.
        tensors = {name: tensors[name].to(device) for name in (source, *companions(source)) if name in tensors}
        if isinstance(form.codec, type(stored)):
            return form.codec.from_checkpoint(source, tensors, form.shape)
        parts = {part: t.to(device) for part, t in stored.from_checkpoint(source, tensors, form.shape).items()}
        return form.codec.encode(stored.decode(parts, form.shape, torch.float32))  # a head in 4 bits
    weight = tensors[source].to(device)
    if form.codec.quantizes and not all_finite(weight):  # on a GPU some code would hide it
        raise UserError(
            f"model_name: {source} of the checkpoint holds NaN or infinity: it is damaged, download it again"
        )
    return form.codec.encode(weight)


def _read(unit: Unit, weights: Weights, device: torch.device) -> dict[str, Tensor]:
    return weights.read(expected_tensors(unit, weights), device)


def _broadcast(unit: Unit, encoded: Tensor | None, source: int, world: World) -> Tensor:
    if world.size == 1:
        assert encoded is not None
        return encoded
    buffer = (
        encoded
        if encoded is not None
        else torch.empty(unit.frozen.layout.nbytes, dtype=torch.uint8, device=world.device)
    )
    dist.broadcast(buffer, src=source)
    return buffer
