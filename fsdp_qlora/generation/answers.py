"""Answers to prompts in their order: batches of rows dealt to the ranks, each round of them brought together."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import TrainingStopped, first_line, is_out_of_memory, release_frames
from fsdp_qlora.generation.decoder import Decoder
from fsdp_qlora.generation.sampling import Sampling
from fsdp_qlora.generation.steps import Steps

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """The tokens that follow a prompt. is_ended: a stop token, which is not among them, ended it."""

    row: int  # of the prompts
    ids: list[int]
    is_ended: bool


class NoMemory(TrainingStopped):
    """A rank's GPU had no memory left for an answer. Raised on every rank alike."""


def with_memory(world: World, do: Callable[[], T]) -> T:
    """Return what `do`, which is no collective, gives. Raises NoMemory where a rank had no memory for it. A
    collective."""
    value, why = None, ""
    try:
        value = do()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        why = first_line(error)
        release_frames(error)
    failed = [rank for rank, (flag,) in enumerate(world.gather([bool(why)])) if flag]
    if failed:
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        said = world.gather_texts(why)[failed[0]]
        raise NoMemory(f"rank {failed[0]} ran out of GPU memory ({said})").on_every_rank(world.rank)
    return value  # type: ignore[return-value]


class Answers:
    """Makes the answers to prompts, on all ranks together. seconds and tokens: spent and made so far, of all ranks.

    captures: whether steps may become a CUDA graph, which keeps its memory."""

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        stops: Sequence[int],
        most_new: int,
        world: World,
        captures: bool = True,
    ) -> None:
        self.decoder, self.world = decoder, world
        self.steps = Steps(decoder, sampling, stops, most_new, world, captures)
        self.seconds, self.tokens = 0.0, 0

    def __call__(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers of one round after the other, in the order of the prompts, alike on every rank.

        A collective: every rank takes all rounds. prompts: token ids, at least one each, the same on every rank.
        numbers: by which each draws its tokens; None: its place among them.
        Raises NoMemory, unless ranks bring each other the blocks: they cannot leave a pass and stay in step."""
        world, rows = self.world, self.decoder.rows
        start = time.perf_counter()
        for first in range(0, len(prompts), rows * world.size):
            own = range(first + world.rank * rows, min(first + (world.rank + 1) * rows, len(prompts)))
            found = self._run([prompts[i] for i in own], [i if numbers is None else numbers[i] for i in own])
            answers = self._together([Answer(i, *one) for i, one in zip(own, found, strict=True)])
            self.tokens += sum(len(answer.ids) + answer.is_ended for answer in answers)
            self.seconds = self.seconds_before + time.perf_counter() - start
            yield answers
        self.seconds_before = self.seconds

    seconds_before = 0.0  # of calls that have ended

    def _run(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[tuple[list[int], bool]]:
        if self.decoder.is_joint:
            return self.steps.run(prompts, numbers)
        return with_memory(self.world, lambda: self.steps.run(prompts, numbers))

    def _together(self, own: Sequence[Answer]) -> list[Answer]:
        """Return every rank's answers, in order."""
        numbers = [n for answer in own for n in (answer.row, answer.is_ended, len(answer.ids), *answer.ids)]
        longest = max(int(length) for (length,) in self.world.gather([len(numbers)]))
        every = self.world.gather([len(numbers), *numbers, *([0] * (longest - len(numbers)))])
        found = []
        for count, *flat in every:
            at = 0
            while at < count:
                length = int(flat[at + 2])
                ids = [int(token) for token in flat[at + 3 : at + 3 + length]]
                found.append(Answer(int(flat[at]), ids, bool(flat[at + 1])))
                at += 3 + length
        return found
