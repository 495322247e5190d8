"""Numbers of many steps, reduced to what a picture can show: running means, and a band that loses no spike."""

import numpy as np
import numpy.typing as npt

COLUMNS = 800  # about as many as there are pixels across
MANY = 40  # steps from which on there is a running mean
WARM_UP_STEPS = 3  # the first steps compile kernels, grow the allocator's pools and fill caches: not typical
WINDOW_PART, MOST_WINDOW = 20, 1000  # of the steps go into one mean; at most

Numbers = npt.NDArray[np.float64]


def mean_window(steps: int) -> int:
    """Return how many of so many steps go into one running mean; 0 where they are too few for any."""
    return min(steps // WINDOW_PART, MOST_WINDOW) if steps >= MANY else 0


def running_mean(values: Numbers, window: int) -> Numbers:
    """Return, for each step, the mean of the finite values of the last `window` steps; NaN where there are none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    n = counts[ends] - counts[starts]
    return np.where(n > 0, (sums[ends] - sums[starts]) / np.maximum(n, 1), np.nan)


def band(steps: Numbers, values: Numbers, columns: int) -> tuple[Numbers, Numbers, Numbers]:
    """Return (first step, lowest, highest value) of each of so many pieces of the run; what is infinite is left out."""
    edges = np.linspace(0, len(steps), columns, endpoint=False).astype(np.int64)
    finite = np.where(np.isfinite(values), values, np.nan)
    return steps[edges], np.fmin.reduceat(finite, edges), np.fmax.reduceat(finite, edges)
