"""The choice of a row's next token from its logits: the most likely one, or one drawn with numbers of its own.

B rows, V vocabulary, N new tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-30  # whose reciprocal float32 has; all below it are the most likely token


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the filters work one after the other, as in transformers. temperature 0: the most likely.

    A row's random numbers hang on the seed and the row's number in the file alone, so neither the batch that it is in
    nor the number of ranks changes them."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 42

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def draw(self, row: int, count: int) -> Tensor:
        """Return float32 [count] in [0, 1), for the new tokens of a row."""
        return torch.from_numpy(np.random.default_rng([self.seed, row]).random(count, dtype=np.float32))


def pick(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Return int64 [B]. uniform_B: float32 in [0, 1), looked at where tokens are drawn. Nothing waits for the GPU."""
    if sampling.is_greedy:
        return logits_BV.argmax(-1)
    count = min(sampling.top_k, logits_BV.shape[1]) if sampling.top_k else logits_BV.shape[1]
    values, order = logits_BV.topk(count, dim=-1)
    # Below 0 before the division, which for a small temperature may end at -infinity, but not at two infinities.
    chances = ((values - values[:, :1]) / max(sampling.temperature, LEAST_TEMPERATURE)).softmax(-1)
    if sampling.top_p < 1:  # the fewest tokens whose chances sum to it, the most likely always
        chances = chances.masked_fill(chances.cumsum(-1) - chances >= sampling.top_p, 0.0)
    below = chances.cumsum(-1)
    chosen = (below <= uniform_B[:, None] * below[:, -1:]).sum(-1, keepdim=True)
    last = ((chances > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # of NaN, the first as well
    return order.gather(1, torch.minimum(chosen, last))[:, 0]
