"""Bins: full, as many every epoch, every row once, whatever the number of ranks."""

import time

import numpy as np
import pytest

from fsdp_qlora.data.batches import Batches
from fsdp_qlora.data.packing import Bins, best_fit
from fsdp_qlora.data.row_lengths import RowLengths
from tests.data.test_batches import learnt, make_rows


def alpaca_like(count: int) -> np.ndarray:
    return np.clip(np.random.default_rng(3).lognormal(4.8, 0.6, count), 20, 512).astype(np.int64)


@pytest.mark.parametrize("capacity", [512, 2048])
def test_no_bin_is_over_full_and_few_tokens_are_left_free(capacity):
    bins = Bins(capacity, alpaca_like(5000))
    found = bins.rows(np.random.default_rng(0))
    assert sorted(np.concatenate(found).tolist()) == list(range(5000))
    assert len(found) == len(bins)
    assert max(bins.lengths[rows].sum() for rows in found) <= capacity
    assert bins.fill > 0.99


def test_best_fit_takes_the_fullest_bin_that_has_space():
    assert best_fit(np.array([6, 5, 4, 3, 2, 5, 5]), 10).tolist() == [0, 1, 0, 1, 1, 2, 2]
    assert best_fit(np.array([10, 10, 1]), 10).tolist() == [0, 1, 2]


def test_epochs_and_seeds_mix_rows_and_keep_the_number_of_bins():
    bins = Bins(1024, alpaca_like(5000))
    first, again, other = (
        [set(rows.tolist()) for rows in bins.rows(np.random.default_rng(seed))] for seed in ((1, 0), (1, 0), (1, 1))
    )
    assert first == again
    assert len(first) == len(other)
    assert sum(rows in other for rows in first) < len(first) / 20


def test_a_million_rows_take_seconds():
    lengths = alpaca_like(1_000_000)
    start = time.process_time()
    assert len(best_fit(np.sort(lengths)[::-1], 2048)) == len(lengths)
    assert time.process_time() - start < 30


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(2, 2, 1), (1, 2, 2), (1, 1, 4), (4, 1, 1)])
def test_a_step_has_the_same_bins_however_they_are_shared(batch_size, accumulation, world_size):
    rows = make_rows(60, context_length=40)
    bins = Bins(40, rows.lengths)
    assert len(bins) > 8
    alone = Batches(rows, 4, 1, 1, 0, seed=7, flat=RowLengths.of(rows, bins))
    ranks = [
        Batches(rows, batch_size, accumulation, world_size, r, 7, flat=RowLengths.of(rows, bins))
        for r in range(world_size)
    ]
    seen = []
    for index in range(alone.steps_per_epoch):
        (whole,) = alone.step(1, index)
        parts = [batch for rank in ranks for batch in rank.step(1, index)]
        assert sorted(row for batch in parts for row in batch.rows) == sorted(whole.rows)
        assert sorted(x for batch in parts for x in learnt(batch)) == learnt(whole)
        assert max(batch.input_ids.numel() for batch in parts) <= batch_size * 40
        seen += whole.rows
    assert sorted(seen) == rows.index.tolist()
