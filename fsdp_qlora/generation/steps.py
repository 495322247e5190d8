"""The steps of a batch of rows: a token more for each, until all rows have ended or are as long as they may get.

All that a step reads and writes is in memory that stays where it is, so that on a GPU one captured graph is every step:
a step of an 8B model is some 600 kernels, which the host would need longer to launch than the GPU to run.

B rows, N new tokens at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.generation.decoder import Decoder
from fsdp_qlora.generation.sampling import Sampling, pick

LOOK_EVERY = 8  # steps of a captured graph, before the host looks whether all rows have ended


class Steps:
    """The new tokens of the rows of a decoder. stops: tokens at which a row ends."""

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        stops: Sequence[int],
        most_new: int,
        world: World,
        captures: bool = True,
    ) -> None:
        self.captures = captures
        self.decoder, self.sampling, self.most_new, self.world = decoder, sampling, most_new, world
        rows, device = decoder.rows, world.device
        self.tokens_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.made_BN = torch.zeros(rows, most_new, dtype=torch.int64, device=device)
        self.uniform_BN = torch.zeros(rows, most_new, device=device)
        self.ended_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.stops = torch.tensor(list(stops), dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = 0  # steps so far without a graph: the first makes all that is made once

    def run(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[tuple[list[int], bool]]:
        """Return for each prompt (its new tokens without the one that ends it, whether one did).

        numbers: of the rows in the file. A collective where the decoder is joint."""
        assert len(prompts) <= self.decoder.rows
        passes = self._most(self.decoder.passes(prompts))
        if not passes:  # no rank has rows
            return []
        self.ended_B.fill_(True)[: len(prompts)] = False
        self.column.zero_()
        if not self.sampling.is_greedy and numbers:
            drawn = torch.stack([self.sampling.draw(number, self.most_new) for number in numbers])
            self.uniform_BN[: len(numbers)] = drawn.to(self.uniform_BN.device)
        with torch.no_grad():
            self._take(self.decoder.prefill(prompts, passes))
            made, longest = 1, max(map(len, prompts), default=0)
            while made < self.most_new and self._goes_on(made):
                if self._is_switch(longest + made):
                    self._take(self._anew(prompts, made))
                else:
                    self._step()
                made += 1
        return self._found(len(prompts), made)

    def _take(self, logits_BV: Tensor) -> None:
        """Choose a token for each row and note it."""
        uniform_B = self.uniform_BN.index_select(1, self.column)[:, 0]
        self.tokens_B.copy_(pick(logits_BV, uniform_B, self.sampling))
        self.made_BN.index_copy_(1, self.column, self.tokens_B[:, None])
        self.ended_B |= (self.tokens_B[:, None] == self.stops).any(1)
        self.column += 1

    def _eager_step(self) -> None:
        self._take(self.decoder.step(self.tokens_B))

    def _step(self) -> None:
        if self._graph is None and self._eager and self.captures and self.decoder.can_capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._eager_step()
            self._graph = graph
        if self._graph is not None:
            self._graph.replay()
            return
        self._eager_step()
        self._eager += 1

    def _goes_on(self, made: int) -> bool:
        """Return whether a row of this rank, or where ranks go together of any, has not ended."""
        if self._graph is not None and made % LOOK_EVERY:
            return True
        return bool(self._most(not bool(self.ended_B.all())))

    def _is_switch(self, length: int) -> bool:
        """Return whether a row, of any rank where they go together, is the first token longer than the switch."""
        switch = self.decoder.switch
        return switch is not None and bool(self._most(length == switch + 1))

    def _anew(self, prompts: Sequence[Sequence[int]], made: int) -> Tensor:
        """Return the logits behind all tokens so far, whose keys are computed once more."""
        new = self.made_BN[: len(prompts), :made].tolist()
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, new, strict=True)]
        return self.decoder.prefill(rows, self._most(self.decoder.passes(rows)))

    def _most(self, number: float) -> int:
        if not self.decoder.is_joint:
            return int(number)
        return int(max(most for (most,) in self.world.gather([number])))

    def _found(self, count: int, made: int) -> list[tuple[list[int], bool]]:
        stops = set(self.stops.tolist())
        found = []
        for tokens in self.made_BN[:count, :made].tolist():
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            found.append((tokens if end is None else tokens[:end], end is not None))
        return found
