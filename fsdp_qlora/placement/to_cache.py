"""Units kept in the base cache while they are loaded, for the next start.

A rank writes the unit that it has encoded, at the end of its turn, while the next one's weights are being read: nothing
is held in memory for it. Nodes may share a home or have their own, so who sees whose folder is found out first; a unit
encoded on a node with another home is written by one of this home's ranks when it arrives.

A disk may refuse what its free space promised, by a quota. Then all that this run has written is removed again, by each
rank what it wrote, so that what else the user writes finds the space; a note keeps the next start from trying again.
"""

import secrets
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.models.causal_lm import Unit
from fsdp_qlora.placement.cache_use import CacheUse
from fsdp_qlora.units import as_gib
from fsdp_qlora.weights.base_cache.disk import NO_ROOM, NOT_KEPT
from fsdp_qlora.weights.base_cache.lanes import Lanes
from fsdp_qlora.weights.base_cache.unit_file import Contents, Damaged, Writing
from fsdp_qlora.weights.source import Weights

CHANGED = f"{NOT_KEPT}: the checkpoint's files were changed while they were read"


class Keeper:
    """Writes units of this rank's home, until the disk refuses. A context manager."""

    def __init__(
        self,
        units: Sequence[Unit],
        damaged: Collection[str],
        use: CacheUse,
        weights: Weights,
        lanes: Lanes,
        world: World,
    ) -> None:
        """Prepare the folder, and say where that cannot be. damaged: names of units whose file is replaced.

        A collective."""
        self._kept, self._owed = use.kept, use.owed
        self._weights, self._lanes, self._world, self._damaged = weights, lanes, world, damaged
        homes = _homes(self._kept.folder, world)
        self._home = [rank for rank, home in enumerate(homes) if home == homes[world.rank]]  # its ranks
        self._leads = self._home[0] == world.rank
        self._names = [unit.name for unit in units]  # to be kept, by one of the home's ranks
        removed, refused = self._kept.prepare(self._names, self._owed) if self._leads else ([], "")
        everyone = world.gather_texts(refused)
        self._refused = everyone[self._home[0]]
        _say(world, [*world.gather_texts("\n".join(removed)), *everyone])
        self._told = self._refused  # what has been said
        self._no_room: OSError | None = None  # why all that was written is removed again
        self._turn = 0
        self._taken_back = 0  # bytes
        self._finishing: list[tuple[str, Writing, Future[int]]] = []
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="base cache")  # waits for the disk

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *exception: object) -> None:
        self._finisher.shutdown(cancel_futures=True)
        for _, writing, _ in self._finishing:
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
        written, damaged = 0, ""
        for name, writing, finishing in self._finishing:
            try:
                written += finishing.result()
            except Damaged as error:
                damaged = f"{NOT_KEPT}: {name}: {error}"
            except OSError as error:
                self._refuse(error)
            finally:
                writing.abandon()
        full = [bool(flag) for (flag,) in self._world.gather([float(self._no_room is not None)])]
        is_full = any(full[rank] for rank in self._home)
        taken_back, written = self._take_back() if is_full else 0, 0 if is_full else written
        each = self._world.gather([float(written), float(taken_back)])
        written_by_all = sum(nbytes for nbytes, _ in each)
        if is_full:
            self._note_full(sum(int(each[rank][1]) for rank in self._home), full)
        new = self._refused if self._refused != self._told else ""
        _say(self._world, [*self._world.gather_texts(new), *self._world.gather_texts(damaged)])
        if self._leads and written_by_all:
            self._kept.touch()
        return f"{as_gib(written_by_all)} kept for the next start in {self._kept.folder}" if written_by_all else ""

    def _write(self, unit: Unit, whole: Tensor) -> None:
        if self._refused or (unit.name not in self._damaged and self._is_there(unit.name)):
            return
        writing = None
        try:
            if self._content() != self._kept.content:
                self._refused = CHANGED
            elif (full := self._kept.refused()) is not None:
                self._refused = f"{NOT_KEPT}: another process met the end of the disk ({full.reason}); {full}"
            else:
                self._kept.make()
                self._refused = self._kept.lack_of_room([unit.name], self._owed)  # others may have filled it meanwhile
            if self._refused:
                return
            total = unit.frozen.expected
            assert total is not None, "the checksum of what was encoded"
            writing = self._kept.begin(unit.name, total)
            self._lanes.store(writing, whole, unit.frozen.layout.used)
            self._finishing.append((unit.name, writing, self._finisher.submit(writing.finish)))
        except OSError as error:
            if writing is not None:
                writing.abandon()
            self._refuse(error)

    def _content(self) -> str | None:
        """Return what tells the checkpoint's files now."""
        with suppress(UserError):  # they are gone: the reader tells
            return self._weights.content()
        return None

    def _is_there(self, name: str) -> bool:
        """Return whether another run has written the unit meanwhile."""
        try:
            return isinstance(self._kept.contents(name), Contents)
        except (Damaged, OSError):
            return False

    def _refuse(self, error: OSError) -> None:
        if error.errno in NO_ROOM and self._no_room is None:
            self._no_room = error
            self._refused = self._refused or NOT_KEPT  # the line comes at the end
            self._take_back()
            self._kept.refuse(error, self._names)  # for the home's other ranks, and for a run that is killed
        else:
            self._refused = self._refused or self._kept.refusal(error)

    def _take_back(self) -> int:
        """Remove what this rank has written; return its bytes, those of earlier calls included."""
        for _, writing, finishing in self._finishing:
            with suppress(OSError, Damaged):
                self._taken_back += finishing.result()
            writing.take_back()
        self._finishing = []
        return self._taken_back

    def _note_full(self, taken_back: int, full: Sequence[bool]) -> None:
        """Note what the disk has free now that all ranks of this home have removed what they wrote; say so once.

        full: by rank, whether the disk has refused it."""
        first = next(rank for rank in self._home if full[rank])
        if self._no_room is None or first != self._world.rank:
            self._refused = self._told  # another rank says it
            return
        noted = self._kept.refuse(self._no_room, self._names)
        removed = f"; {as_gib(taken_back)} that this run had written are removed" if taken_back else ""
        self._refused = f"{NOT_KEPT}: the disk of {self._kept.folder} refused it ({noted.reason}){removed}; {noted}"


def _say(world: World, lines: Sequence[str]) -> None:
    for line in dict.fromkeys(line for text in lines for line in text.splitlines()):
        world.say(line)


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
