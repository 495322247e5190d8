"""Units kept in the base cache while they are loaded, for the next start.

A rank writes the unit that it has encoded, at the end of its turn, while the next one's weights are being read: nothing
is held in memory for it. Nodes may share a home or have their own, so who sees whose folder is found out first; a unit
encoded on a node with another home is written by one of this home's ranks when it arrives.
"""

import secrets
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.causal_lm import Unit
from fsdp_qlora.units import as_gib
from fsdp_qlora.weights.base_cache.kept import KeptBase
from fsdp_qlora.weights.base_cache.lanes import Lanes
from fsdp_qlora.weights.base_cache.unit_file import Contents, Damaged, Writing
from fsdp_qlora.weights.source import Weights

CHANGED = "base_cache: not kept for the next start: the checkpoint's files were changed while they were read"


class Keeper:
    """Writes units of this rank's home, until the disk refuses. A context manager."""

    def __init__(
        self,
        units: Sequence[Unit],
        damaged: Collection[str],
        kept: KeptBase,
        weights: Weights,
        lanes: Lanes,
        world: World,
    ) -> None:
        """Prepare the folder, and say where that cannot be. damaged: names of units whose file is replaced.

        A collective."""
        self._kept, self._weights, self._lanes, self._world, self._damaged = kept, weights, lanes, world, damaged
        homes = _homes(kept.folder, world)
        self._home = [rank for rank, home in enumerate(homes) if home == homes[world.rank]]  # its ranks
        leads = self._home[0] == world.rank
        stale, self._refused = kept.prepare([unit.name for unit in units]) if leads else ("", "")
        self._leads = leads
        refused = world.gather_texts(self._refused)
        self._refused = refused[self._home[0]]
        for line in dict.fromkeys([*world.gather_texts(stale), *refused]):
            if line:
                world.say(line)
        self._told = self._refused  # what has been said
        self._turn, self._written = 0, 0
        self._finishing: list[tuple[Writing, Future[int]]] = []
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="base cache")  # waits for the disk

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *exception: object) -> None:
        self._finisher.shutdown(cancel_futures=True)
        for writing, _ in self._finishing:
            writing.abandon()
        if self._leads:
            self._kept.withdraw()

    def encoded(self, unit: Unit, whole: Tensor) -> None:
        """Write a unit that this rank has encoded. whole: uint8 [nbytes]."""
        self._write(unit, whole)

    def received(self, unit: Unit, whole: Tensor, source: int) -> None:
        """Write a unit that another rank has encoded, if its home is not this one and it is this rank's turn."""
        if source in self._home:
            return
        self._turn += 1
        if self._home[self._turn % len(self._home)] == self._world.rank:
            self._write(unit, whole)

    def end(self) -> str:
        """Return what was kept, in a few words, once it is on the disk. Says what failed. A collective."""
        for writing, finishing in self._finishing:
            try:
                self._written += finishing.result()
            except OSError as error:
                self._refuse(error)
            finally:
                writing.abandon()
        new = self._refused if self._refused != self._told else ""
        for line in dict.fromkeys(line for line in self._world.gather_texts(new) if line):
            self._world.say(line)
        mine = self._world.gather([float(self._written)])
        written = sum(nbytes for (nbytes,) in mine)
        return f"{as_gib(written)} kept for the next start in {self._kept.folder}" if written else ""

    def _write(self, unit: Unit, whole: Tensor) -> None:
        if self._refused or (unit.name not in self._damaged and self._is_there(unit.name)):
            return
        writing = None
        try:
            if self._content() != self._kept.content:
                self._refused = CHANGED
                return
            total = unit.frozen.expected
            assert total is not None, "the checksum of what was encoded"
            writing = self._kept.begin(unit.name, total)
            self._lanes.store(writing, whole, unit.frozen.layout.used)
            self._finishing.append((writing, self._finisher.submit(writing.finish)))
        except OSError as error:
            if writing is not None:
                writing.abandon()
            self._refuse(error)

    def _content(self) -> str | None:
        """Return what tells the checkpoint's bytes now."""
        with suppress(OSError):
            return self._weights.content()
        return None

    def _is_there(self, name: str) -> bool:
        """Return whether another run has written the unit meanwhile."""
        try:
            return isinstance(self._kept.contents(name), Contents)
        except (Damaged, OSError):
            return False

    def _refuse(self, error: OSError) -> None:
        self._refused = self._refused or self._kept.refusal(error)


def _homes(folder: Path, world: World) -> list[int]:
    """Return for each rank the first rank that has the same folder of that name. A collective."""
    if world.size == world.local_size:
        return [0] * world.size
    first = world.rank - world.local_rank
    number = int(world.gather([float(secrets.randbits(48))])[0][0])  # another run's marks have another
    mark = folder / f".home-{number}-{first}"
    if world.local_rank == 0:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    world.barrier()
    seen = [int(path.name.rpartition("-")[2]) for path in folder.glob(f".home-{number}-*")]
    homes = [int(home) for (home,) in world.gather([float(min(seen, default=first))])]
    if world.local_rank == 0:
        with suppress(OSError):
            mark.unlink()
    return homes
