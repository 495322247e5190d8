"""Units read from the base cache: each rank reads from the disk what it holds, straight into its place.

Where a placement needs a whole unit on every rank, the ranks read a part each and gather it. A unit is taken from the
cache where every rank finds it there; a file that turns out to be damaged is left to be encoded anew, by all of them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.causal_lm import Unit
from fsdp_qlora.placement.base import Placement, Slot
from fsdp_qlora.placement.norms import SeenNorms, room_for, span_of
from fsdp_qlora.torch_compat import all_gather
from fsdp_qlora.weights.base_cache.kept import KeptBase
from fsdp_qlora.weights.base_cache.lanes import Lanes, results
from fsdp_qlora.weights.base_cache.unit_file import Contents, Damaged, Reading

AHEAD = 1  # units whose reading is begun before the one that is waited for: the plan counts two in GPU memory


@dataclass
class _Coming:
    """A unit whose bytes are being read."""

    unit: Unit
    slot: Slot
    whole: Tensor | None  # of a unit that this rank needs whole
    gathered: bool  # whether `slot` is this rank's part of `whole`
    total: int = 0  # the unit's checksum, by its file
    file: Reading | None = None
    reading: list[Future[None]] = field(default_factory=list)
    wrong: str = ""  # why its file cannot be taken
    norms: Tensor | None = None  # of `norms.span_of`, where this rank does not need the unit whole


def place_kept(
    units: Sequence[Unit],
    kept: KeptBase,
    placement: Placement,
    lanes: Lanes,
    world: World,
    done: Callable[[], object],
    seen: SeenNorms,
) -> tuple[list[Unit], set[str]]:
    """Place the units that the cache has. A collective.

    done: called for each. seen: takes their norms. Returns (the units that are left, the names of those among them
    whose file is to be replaced)."""
    found = [_look(kept, unit.name) for unit in units]
    here = [[float(isinstance(one, Contents)), float(isinstance(one, str) and one != "")] for one in found]
    by_rank = world.gather([number for pair in here for number in pair])
    everywhere = [min(rank[2 * i] for rank in by_rank) == 1 for i in range(len(units))]
    damaged = {unit.name for i, unit in enumerate(units) if any(rank[2 * i + 1] for rank in by_rank)}
    wrong = [f"{unit.name} ({one})" for unit, one in zip(units, found, strict=True) if isinstance(one, str) and one]
    waiting, lacks_direct = deque[_Coming](), False
    left = [unit for i, unit in enumerate(units) if not everywhere[i]]
    pairs = zip(units, found, strict=True)
    ready = deque((unit, one) for i, (unit, one) in enumerate(pairs) if everywhere[i] and isinstance(one, Contents))
    if ready:
        kept.touch()
    while ready or waiting:
        while ready and len(waiting) <= AHEAD:
            unit, contents = ready.popleft()
            slot = _slot_on_all_ranks(unit, placement, world)
            waiting.append(_start(unit, contents, slot, kept, lanes, world))
        coming = waiting.popleft()
        _wait(coming)
        lacks_direct |= coming.file is not None and coming.file.lacks_direct
        if any(bad for (bad,) in world.gather([float(bool(coming.wrong))])):
            damaged.add(coming.unit.name)
            left.append(coming.unit)
            if coming.wrong:
                wrong.append(f"{coming.unit.name} ({coming.wrong})")
        else:
            _place(coming, placement, world, seen, str(kept.folder))
            done()
        del coming  # before memory for another is taken
    lines = [_line(wrong, kept), *_slower(lacks_direct, lanes, kept)]
    for line in dict.fromkeys(line for text in world.gather_texts("\n".join(lines)) for line in text.splitlines()):
        if line:
            world.say(line)
    order = {unit.name: i for i, unit in enumerate(units)}
    return sorted(left, key=lambda unit: order[unit.name]), damaged


def _line(wrong: Sequence[str], kept: KeptBase) -> str:
    """Return the line about files that cannot be taken, '' if there are none."""
    if not wrong:
        return ""
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"base_cache: {wrong[0]}{more} of {kept.folder} cannot be taken: encoded anew"


def _slower(lacks_direct: bool, lanes: Lanes, kept: KeptBase) -> list[str]:
    """Return a line for each thing that this machine lacks, with its price."""
    direct = (
        f"base_cache: the file system of {kept.folder} has no direct reads (O_DIRECT): each byte is copied once more "
        "by a core, and the system's memory fills with what is read"
    )
    pinned = (
        "base_cache: the system refuses to pin 2 MiB of host memory for each reading thread: the driver copies each "
        "byte for the GPU once more; raise `ulimit -l`"
    )
    return [line for line, holds in ((direct, lacks_direct), (pinned, lanes.lacks_pinned)) if holds]


def _look(kept: KeptBase, name: str) -> Contents | str:
    """Return what the header of a unit's file says, or why it cannot be taken: '' where there is none."""
    try:
        return kept.contents(name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # the last two are told where it is written
        return ""
    except (Damaged, OSError) as error:
        return _reason(error)


def _slot_on_all_ranks(unit: Unit, placement: Placement, world: World) -> Slot | None:
    """Return the unit's slot on this rank; None where some rank needs all of the unit, which all of them then gather.

    A collective: a system may refuse one rank the pinned memory that another has. Raises UserError as
    `Placement.slot`."""
    slot = world.together(partial(placement.slot, unit))
    return slot if all(has for (has,) in world.gather([float(slot is not None)])) else None


def _start(unit: Unit, contents: Contents, slot: Slot | None, kept: KeptBase, lanes: Lanes, world: World) -> _Coming:
    """Begin to read a unit to where this rank holds it. slot: None: all of it goes to the rank's device."""
    nbytes, whole = unit.frozen.layout.nbytes, None
    gathered = slot is None and world.size > 1 and nbytes % world.size == 0
    if slot is None:
        whole = torch.empty(nbytes, dtype=torch.uint8, device=world.device)
        share = nbytes // world.size if gathered else nbytes
        first = share * world.rank if gathered else 0
        slot = Slot(whole[first : first + share], first)
    coming = _Coming(unit, slot, whole, gathered, contents.total)
    try:
        coming.file = kept.open(unit.name, contents)
        coming.reading = lanes.fetch(coming.file, slot.memory, slot.start)
        if whole is None and unit.norms:
            coming.norms = room_for(unit)
            coming.reading += lanes.fetch(coming.file, coming.norms, span_of(unit)[0])
    except OSError as error:
        coming.wrong = _reason(error)
    return coming


def _wait(coming: _Coming) -> None:
    """Return once nothing is being read any more into a unit's place."""
    try:
        results(coming.reading)
    except (Damaged, OSError) as error:
        coming.wrong = _reason(error)
    finally:
        if coming.file is not None:
            coming.file.close()


def _place(coming: _Coming, placement: Placement, world: World, seen: SeenNorms, origin: str) -> None:
    unit, whole = coming.unit, coming.whole
    unit.frozen.expected, unit.frozen.origin = coming.total, origin
    if whole is None:
        if coming.norms is not None:
            seen.take(unit, coming.norms, span_of(unit)[0])
        coming.slot.filled()
        return
    if coming.gathered:
        all_gather(whole, coming.slot.memory)
    seen.take(unit, whole)
    world.together(partial(placement.store, unit, whole))


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
