"""What one evaluation came to: what is recorded, plotted and shown of it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation over all ranks, between two optimizer steps."""

    step: int  # optimizer steps done before it
    epoch: float  # epochs completed by then, fractions included
    loss: float  # mean over the label tokens of all evaluated rows
    label_tokens: int
    tokens: int  # padding excluded
    rows: int
    seconds: float
    is_best: bool  # the lowest loss so far

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is more than a float holds."""
        return math.exp(self.loss) if not self.loss >= 700 else math.inf  # NaN stays NaN

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"evaluation loss {self.loss}: no improvement, and training goes on"
        best = ", the lowest so far" if self.is_best else ""
        return f"evaluation loss {self.loss:.4f}{best}, perplexity {self.perplexity:.4g}"
