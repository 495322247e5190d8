"""The placement of a base larger than the cards: in host memory once per node, copied to each device ahead of use."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.memory.shared import HostStore, rounded
from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement.base import Slot
from fsdp_qlora.placement.resident import Residents, keep_at, keep_whole
from fsdp_qlora.placement.streamer import StreamedUnit, Streamer
from fsdp_qlora.plan.plan import Plan


class Streamed:
    """One copy per node in host memory; every rank copies each block to its device ahead of use (see streamer.py).

    resident: for each block, whether it stays on the device instead. head_resident: whether the head does; otherwise
    it is streamed as one more unit after the last block. buffers: staging buffers on the device. link_rate: of the
    copies, bytes per second, if it is known. trains: whether a backward follows a forward; else the next forward does.

    An untied embedding stays in the node's copy, where its rows are read one by one. A tied one is the head as well
    and stays on the device, as do vectors.
    """

    def __init__(
        self,
        world: World,
        resident: Sequence[bool],
        head_resident: bool,
        buffers: int,
        link_rate: float | None = None,
        trains: bool = True,
    ) -> None:
        self.trains = trains
        self.world, self.resident, self.head_resident, self.buffers = world, resident, head_resident, buffers
        self.link_rate = link_rate
        self._sources: dict[str, Tensor] = {}  # a unit's bytes in host memory
        self._refusal_told = False

    def prepare(self, model: CausalModel) -> None:
        self._blocks = list(model.blocks)
        self._order = list(self._blocks)
        if not model.is_tied():  # a tied head is the embedding, which stays on the device
            self._order += [u.name for u in model.units if u.frozen is model.head.frozen]
        self._streamed = {name for name, stays in zip(self._blocks, self.resident, strict=True) if not stays}
        if not self.head_resident and not model.is_tied():
            self._streamed.add(self._order[-1])
        embedding = model.embedding[0].frozen
        in_store = self._streamed | {
            u.name
            for u in model.units
            if u.frozen is embedding and (u.home == "host" or (self.world.device.type == "cpu" and not model.is_tied()))
        }
        self._units = {u.name: u for u in model.units}
        self._residents = Residents([self._units[name] for name in self._blocks if name not in self._streamed])
        self._in_store = [unit.name for unit in model.units if unit.name in in_store]
        pieces = [self._units[name].frozen.layout.nbytes for name in self._in_store]
        self._stores = [HostStore(sum(map(rounded, pieces)), self.world, pieces=pieces)] if pieces else []

    def store(self, unit: Unit, whole: Tensor) -> None:
        if unit.name in self._residents.names:
            self._residents.store(unit, whole)
            return
        if unit.name not in self._in_store:
            keep_whole(unit, whole)
            return
        piece = self._place(unit)
        self._write(piece, whole)
        if unit.name not in self._streamed:  # the embedding, whose rows the device reads itself
            keep_at(unit, piece if self._is_readable() else whole)

    def slot(self, unit: Unit) -> Slot | None:
        if unit.name not in self._in_store:
            return None
        piece = self._place(unit)
        mine = self._stores[0].share(piece.numel())
        if unit.name in self._streamed:
            return Slot(piece[mine], mine.start)
        return Slot(piece[mine], mine.start, partial(keep_at, unit, piece)) if self._is_readable() else None

    def finish(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self._meet()
        self._stream()

    def promised_bytes(self, unit: Unit) -> int:
        return 0 if unit.name in self._streamed else unit.frozen.layout.nbytes

    def shrink(self, plan: Plan) -> None:
        stays = {name for name, block in zip(self._blocks, plan.blocks, strict=True) if block.resident}
        stays |= {name for name in self._order[len(self._blocks) :] if plan.head_resident}
        leaving = [name for name in self._order if name not in self._streamed | stays]
        if not leaving and plan.staging == self.buffers:
            return
        nbytes = sum(rounded(self._units[name].frozen.layout.nbytes) for name in leaving)
        self._stores += [HostStore(nbytes, self.world)] if nbytes else []
        for name in leaving:
            whole = self._units[name].frozen.flat.detach().view(torch.uint8)
            self._sources[name] = self._stores[-1].take(whole.numel())
            self._write(self._sources[name], whole)
        self.buffers = plan.staging
        self._streamed |= set(leaving)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self._meet()
        for name in self._order:
            self._units[name].frozen.acquire = None  # releases the buffers before new ones are allocated
            if name in self._streamed:
                self._units[name].frozen.release()
        self._stream()

    def _meet(self) -> None:
        """Return when every rank has written its part; say once where the system has refused to page-lock it."""
        refused = max((store.refused for store in self._stores), default=0)
        code = max(int(code) for (code,) in self.world.gather([refused]))
        if code and not self._refusal_told:
            self.world.say(
                f"the system refuses to page-lock the host copy of the frozen base (CUDA error {code}): blocks are "
                "copied by way of the driver's own buffers, at about half the speed. Raise `ulimit -l` (memlock) or "
                "the container's limit"
            )
        self._refusal_told = self._refusal_told or bool(code)

    def _place(self, unit: Unit) -> Tensor:
        """Return a unit's place in the first store. They are taken in the order in which they are page-locked."""
        while unit.name not in self._sources:
            name = self._in_store[len(self._sources)]
            self._sources[name] = self._stores[0].take(self._units[name].frozen.layout.nbytes)
        return self._sources[unit.name]

    def _write(self, piece: Tensor, whole: Tensor) -> None:
        """Begin the copy of this rank's share of a unit's bytes to their place in host memory."""
        mine = self._stores[-1].share(whole.numel())
        piece[mine].copy_(whole[mine], non_blocking=True)

    def _is_readable(self) -> bool:
        """Return whether the device can read the store's memory itself."""
        return self.world.device.type != "cuda" or not self._stores[0].refused

    def _stream(self) -> None:
        """Stream the units that are in host memory, from now on."""
        units = [StreamedUnit(self._units[name].frozen, self._sources.get(name)) for name in self._order]
        backwards = len(self._blocks) if self.trains else 0
        streamer = Streamer(units, backwards, self.buffers, self.world.device, self.link_rate)
        for position, unit in enumerate(units):
            unit.frozen.acquire = partial(streamer.acquire, position)
