"""Where the tensors of a step lie in the arena, found by rehearsing the step, once for each mix of blocks."""

from collections.abc import Sequence

from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.world import World
from fsdp_qlora.memory.arena_layout import Schedule, place
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.candidate import BlockPlan
from fsdp_qlora.plan.rehearsal import rehearse, rehearse_forward


class Layouts:
    """Where the tensors of a step lie, for rows of `longest` tokens, by what the blocks keep."""

    def __init__(self, model: CausalModel, config: Config, longest: int, widens: bool, world: World) -> None:
        self.model, self.config, self.longest, self.widens, self.world = model, config, longest, widens, world
        self._known: dict[tuple[tuple[str, bool], ...], tuple[Schedule, list[list[int]]]] = {}

    def of(self, blocks: Sequence[BlockPlan]) -> Schedule:
        return self._of(blocks)[0]

    def offloaded(self, blocks: Sequence[BlockPlan]) -> list[list[int]]:
        """For each block that offloads, the bytes per token of each tensor (`ActivationOffload.reserve`)."""
        return self._of(blocks)[1]

    def _of(self, blocks: Sequence[BlockPlan]) -> tuple[Schedule, list[list[int]]]:
        kinds = tuple((block.keep, block.offloaded) for block in blocks)
        if kinds not in self._known:
            done = rehearse(self.model, blocks, self.config, self.longest, self.world, self.widens)
            self._known[kinds] = place(done.lives), done.offloaded
        return self._known[kinds]

    def nbytes(self, blocks: Sequence[BlockPlan]) -> int:
        return self.of(blocks).nbytes

    def of_forward(self) -> Schedule:
        """Where the tensors of a forward lie that no backward follows, whatever the blocks keep."""
        return place(rehearse_forward(self.model, self.config, self.longest, self.world))

    def exchanged(self, widens: bool) -> None:
        """Follow the exchange that came to be, which may not be the one that was planned for."""
        if widens != self.widens:
            self.widens = widens
            self._known.clear()
