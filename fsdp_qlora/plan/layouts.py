"""Where the tensors of a step lie in the arena, found by rehearsing the step, once for each mix of blocks."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.world import World
from fsdp_qlora.memory.arena_layout import Life, Schedule, place
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.candidate import BlockPlan
from fsdp_qlora.plan.rehearsal import Rehearsed, rehearse, rehearse_forward
from fsdp_qlora.plan.remembered import remembered, remembering
from fsdp_qlora.plan.shape_key import model_key, options_key


class Layouts:
    """Where the tensors of a step lie, for rows of `longest` tokens, by what the blocks keep. On a GPU they are kept
    for the next start."""

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
            self._known[kinds] = self._placed(
                [kinds, self.widens],
                lambda: rehearse(self.model, blocks, self.config, self.longest, self.world, self.widens),
            )
        return self._known[kinds]

    def nbytes(self, blocks: Sequence[BlockPlan]) -> int:
        return self.of(blocks).nbytes

    def of_forward(self) -> Schedule:
        """Where the tensors of a forward lie that no backward follows, whatever the blocks keep."""
        return self._placed(
            "forward", lambda: Rehearsed(rehearse_forward(self.model, self.config, self.longest, self.world), [])
        )[0]

    def exchanged(self, widens: bool) -> None:
        """Follow the exchange that came to be, which may not be the one that was planned for."""
        if widens != self.widens:
            self.widens = widens
            self._known.clear()

    def _placed(self, what: Any, done: Callable[[], Rehearsed]) -> tuple[Schedule, list[list[int]]]:
        """Return the layout of what is rehearsed, and what is offloaded. Of no rank: all must find one plan."""

        def made() -> Any:
            lives, offloaded = done()
            return [_to_json(place(lives)), offloaded]

        with remembering(self.world.device.type == "cuda"):
            schedule, offloaded = remembered("layout", lambda: [what, self._key], made)
        return _from_json(schedule), offloaded

    @cached_property
    def _key(self) -> list[Any]:
        world = self.world
        return [model_key(self.model), options_key(self.config), self.longest, world.size, world.local_size]


def _to_json(schedule: Schedule) -> Any:
    lives = [[*life[:4], str(life.dtype).removeprefix("torch.")] for life in schedule.lives]
    return [lives, schedule.offsets, schedule.nbytes]


def _from_json(kept: Any) -> Schedule:
    lives, offsets, nbytes = kept
    return Schedule(tuple(_life(*life) for life in lives), tuple(offsets), nbytes)


def _life(birth: int, death: int, nbytes: int, width: int, dtype: str) -> Life:
    return Life(birth, death, nbytes, width, getattr(torch, dtype))
