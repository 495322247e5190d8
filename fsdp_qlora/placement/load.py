"""Loading of a model's frozen bytes, unit by unit: read and encoded by one rank, broadcast to all, then placed.

A device holds what stays and two blocks at most, or a table. Host memory holds the placement's own; a checkpoint's
weights are pages of its files, which the system takes back where memory is short.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fsdp_qlora.distributed.alike import check_alike
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.dora import row_norms
from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement.base import Placement
from fsdp_qlora.placement.cache_use import CacheUse
from fsdp_qlora.placement.from_cache import place_kept
from fsdp_qlora.placement.norms import SeenNorms
from fsdp_qlora.placement.to_cache import Keeper
from fsdp_qlora.runtime.background import beside
from fsdp_qlora.weights.base_cache.lanes import Lanes
from fsdp_qlora.weights.codecs import NotFinite, Parts, companions, is_quantized, stored_codec
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
    if world.has_several_nodes:
        sample = world.first_on_node(weights.sample)
        told = {"model_name": "made-up weights" if sample is None else f"weights with the checksum {sample[:12]}"}
        check_alike(told, world, "give every node the same checkpoint")
    left, start, said, seen = list(model.units), time.perf_counter(), "", SeenNorms()
    bar = tqdm(total=len(left), desc="loading", unit="block", disable=None if world.is_main else True, leave=False)
    if cache is None:
        encode_units(left, model.blocks, weights, placement, world, bar.update, seen)
    else:
        with Lanes(cache.threads, world.device) as lanes:
            left, damaged = place_kept(left, cache.kept, placement, lanes, world, bar.update, seen)
            tidied = cache.kept.tidy() if world.local_rank == 0 else ""
            for line in dict.fromkeys(line for line in world.gather_texts(tidied) if line):
                world.say(line)
            if left:
                with Keeper(left, damaged, cache, weights, lanes, world) as keeper:
                    encode_units(left, model.blocks, weights, placement, world, bar.update, seen, keeper)
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
    blocks: Collection[str],
    weights: Weights,
    placement: Placement,
    world: World,
    done: Callable[[], object],
    seen: SeenNorms,
    keeper: Keeper | None = None,
) -> None:
    """Read, encode and place units. A collective: each rank encodes every n-th block, all at the same time.

    blocks: names of units that are decoder layers."""
    turns = _turns(units, blocks, world.size)
    own = deque(turn[world.rank] for turn in turns if world.rank < len(turn))
    reading = deque[Future[Mapping[str, Tensor]]]()

    def read_ahead() -> None:
        if own:
            # On a thread that nothing waits for: a run that ends early does not stay for a slow disk.
            reading.append(beside(partial(_read, own.popleft(), weights, world.device), world.device))

    def encode_own(turn: Sequence[Unit]) -> Tensor | None:
        if world.rank >= len(turn):
            return None
        tensors = reading.popleft().result()
        read_ahead()  # the disk reads while this rank encodes and broadcasts
        return encode(turn[world.rank], tensors, world.device)

    def place(unit: Unit, source: int, encoded: Tensor | None) -> None:
        """Place a unit's bytes, and let go of them before others arrive."""
        whole = _broadcast(unit, encoded, source, world)
        unit.frozen.expected = checksum(whole)
        seen.take(unit, whole)
        world.together(partial(placement.store, unit, whole))
        if keeper is not None:
            keeper.received(unit, whole, source)

    read_ahead()
    for turn in turns:
        encoded = world.together(partial(encode_own, turn))
        for source, unit in enumerate(turn):
            place(unit, source, encoded if source == world.rank else None)
            done()
        if keeper is not None and encoded is not None:
            keeper.encoded(turn[world.rank], encoded)
        del encoded


def _turns(units: Sequence[Unit], blocks: Collection[str], ranks: int) -> list[list[Unit]]:
    """Return the units that are encoded at the same time, one by each rank: blocks that follow each other.

    Any other is encoded alone. An embedding or a head is larger than a block: no rank holds one beside blocks."""
    turns: list[list[Unit]] = []
    for unit in units:
        follows = turns and unit.name in blocks and turns[-1][0].name in blocks
        if follows and len(turns[-1]) < ranks:
            turns[-1].append(unit)
        else:
            turns.append([unit])
    return turns


def encode(unit: Unit, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Return the unit's bytes, uint8 [nbytes] on `device`, from the checkpoint's tensors."""
    layout = unit.frozen.layout
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    views = layout.views(buffer)
    for entry, source in unit.sources.items():
        encode_entry(layout.entries[entry], source, tensors, device, views[entry])
    for entry, (weight, dtype) in unit.norms.items():
        form = layout.entries[weight]
        decoded = form.codec.decode(views[weight], form.shape, dtype)
        views[entry]["values"].copy_(row_norms(decoded))
        del decoded  # before the next is
    return buffer


def encode_entry(
    form: Entry, source: str, tensors: Mapping[str, Tensor], device: torch.device, out: Parts | None = None
) -> Parts:
    """Return one entry's parts on `device`, from the checkpoint's tensors of that name.

    out: written and returned if given; the weight is then brought to the device a piece at a time."""
    stored = stored_codec(source, tensors)
    if stored is None:
        weight = tensors[source] if out is not None else tensors[source].to(device)
        try:
            return form.codec.encode(weight, out)
        except NotFinite:
            raise UserError(
                f"model_name: {source} of the checkpoint holds NaN or infinity: it is damaged, download it again"
            ) from None
    # On the device already: HQQ's codes are packed anew.
    tensors = {name: tensors[name].to(device) for name in (source, *companions(source)) if name in tensors}
    if isinstance(form.codec, type(stored)):
        parts = form.codec.from_checkpoint(source, tensors, form.shape)
        if out is None:
            return parts
        for name, part in out.items():
            part.copy_(parts[name].view(part.shape))
        return out
    parts = {part: t.to(device) for part, t in stored.from_checkpoint(source, tensors, form.shape).items()}
    return form.codec.encode(stored.decode(parts, form.shape, torch.float32), out)  # a head in 4 bits


def _read(unit: Unit, weights: Weights, device: torch.device) -> Mapping[str, Tensor]:
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
