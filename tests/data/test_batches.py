"""Batches: a step's rows however many ranks share them, each row once an epoch, padding that teaches nothing."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from fsdp_qlora.data.batches import Batches, Rows
from fsdp_qlora.data.collate import IGNORE, Batch
from fsdp_qlora.data.packing import Bins
from fsdp_qlora.data.row_lengths import RowLengths

PAD = 2  # also EOS: padding must be told from it by position


def make_rows(count: int, context_length: int = 20) -> Rows:
    """Rows of unequal length whose ids tell the row; each ends in EOS, which is learnt."""
    return of_lengths(np.random.default_rng(1).integers(2, context_length + 1, count).tolist(), context_length)


def of_lengths(lengths: list[int], context_length: int) -> Rows:
    count = len(lengths)
    ids = [[100 + number] * (length - 1) + [PAD] for number, length in enumerate(lengths)]
    trains = [[False] * (length // 2) + [True] * (length - length // 2) for length in lengths]
    return Rows(
        name="made", form="made", ids=np.concatenate(ids).astype(np.int32), trains=np.concatenate(trains),
        offsets=np.cumsum([0, *lengths]), index=np.arange(count) * 3, context_length=context_length, pad_id=PAD,
        n_read=count, n_dropped=0, n_truncated=0,
    )  # fmt: skip


def steps(rows: Rows, batch_size: int, accumulation: int, world_size: int, epoch: int = 0) -> list[list[list[Batch]]]:
    """[step][rank] -> micro-batches."""
    ranks = [Batches(rows, batch_size, accumulation, world_size, rank, seed=42) for rank in range(world_size)]
    return [[rank.step(epoch, index) for rank in ranks] for index in range(ranks[0].steps_per_epoch)]


@pytest.mark.parametrize("count", [1, 5, 12, 29])
def test_a_step_has_the_same_rows_however_they_are_shared(count: int) -> None:
    rows = make_rows(count)
    want = [{row for batch in step[0] for row in batch.rows} for step in steps(rows, 12, 1, 1)]
    for batch_size, accumulation, world_size in [(1, 12, 1), (3, 4, 1), (6, 1, 2), (2, 2, 3), (1, 3, 4), (1, 1, 12)]:
        got = steps(rows, batch_size, accumulation, world_size)
        assert [{row for rank in step for batch in rank for row in batch.rows} for step in got] == want
        for step in got:
            assert len({len(rank) for rank in step}) == 1, (
                "every rank must do as many micro-batches, or the others wait"
            )
            assert len(step[0]) <= accumulation
            assert max(len(batch.rows) for rank in step for batch in rank) <= batch_size


@pytest.mark.parametrize(("count", "world_size", "accumulation"), list(product([1, 7, 24, 25], [1, 2, 3], [1, 4])))
def test_every_row_once_an_epoch(count: int, world_size: int, accumulation: int) -> None:
    rows = make_rows(count)
    for epoch in range(2):
        seen = [
            row for step in steps(rows, 2, accumulation, world_size, epoch) for r in step for b in r for row in b.rows
        ]
        assert sorted(seen) == rows.index.tolist()


def test_the_last_step_is_spread_evenly_and_a_rank_without_rows_gets_a_filler() -> None:
    (step,) = steps(make_rows(5), 4, 1, 4)
    assert sorted(len(batch.rows) for rank in step for batch in rank) == [1, 1, 1, 2]
    (step,) = steps(make_rows(3), 4, 1, 4)
    fillers = [rank[0] for rank in step if not rank[0].rows]
    assert len(fillers) == 1
    assert fillers[0].input_ids.shape == (1, 1)
    assert fillers[0].labels.numel() == fillers[0].label_positions.numel() == 0
    assert fillers[0].tokens == 0


def test_order_changes_with_epoch_and_seed_alone() -> None:
    rows = make_rows(29)

    def order(epoch: int, seed: int) -> list[set[int]]:
        batches = Batches(rows, 4, 1, 1, 0, seed)
        return [set(batches.step(epoch, index)[0].rows) for index in range(batches.steps_per_epoch)]

    assert order(0, 42) == order(0, 42)
    assert order(0, 42) != order(1, 42)
    assert order(0, 42) != order(0, 43)
    batches = Batches(rows, 4, 1, 1, 0, 42)
    later = batches.step(1, 3)[0].rows
    batches.step(0, 0)
    assert batches.step(1, 3)[0].rows == later  # a step is found by its numbers, not by what was asked before
    with pytest.raises(IndexError, match="step 8 of an epoch of 8 steps"):
        batches.step(0, 8)


def test_padding_is_masked_by_position_and_rows_arrive_whole() -> None:
    rows = make_rows(29)
    for step in steps(rows, 4, 2, 2):
        for batch in (batch for rank in step for batch in rank):
            width = batch.input_ids.shape[1]
            lengths = [int(rows.lengths[number // 3]) for number in batch.rows]
            assert width == min(-(-max(lengths) // 8) * 8, rows.context_length)
            assert batch.tokens == sum(lengths)
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            aligned = torch.full(batch.input_ids.shape, IGNORE)
            aligned.view(-1)[batch.label_positions + 1] = batch.labels
            for place, (number, length) in enumerate(zip(batch.rows, lengths, strict=True)):
                ids = [100 + number // 3] * (length - 1) + [PAD] * (width - length + 1)
                labels = ids[:length] + [IGNORE] * (width - length)
                labels[: length // 2] = [IGNORE] * (length // 2)
                assert batch.input_ids[place].tolist() == ids
                assert aligned[place].tolist() == labels  # EOS is learnt though it is also the padding


def test_long_rows_come_first_and_in_the_smaller_micro_batches() -> None:
    rows = make_rows(7)
    (step,) = steps(rows, 4, 1, 2)
    assert [len(rank[0].rows) for rank in step] == [3, 4]
    assert min(rows.lengths[np.array(step[0][0].rows) // 3]) >= max(rows.lengths[np.array(step[1][0].rows) // 3])


def test_ranks_have_about_the_same_work_at_the_same_time() -> None:
    rows = make_rows(64)
    (step,) = steps(rows, 4, 8, 2)
    for left, right in zip(*step, strict=True):
        assert abs(left.input_ids.shape[1] - right.input_ids.shape[1]) <= 8
    padded = sum(batch.input_ids.numel() for rank in step for batch in rank)
    assert sum(batch.tokens for rank in step for batch in rank) > 0.75 * padded


def learnt(batch: Batch) -> list[tuple[int, ...]]:
    """(position in its row, token, label) of each labelled position, sorted."""
    flat = batch.input_ids.flatten()
    if batch.segments is None:
        places = torch.arange(batch.input_ids.shape[1]).repeat(batch.input_ids.shape[0])
    else:
        places = batch.segments.positions[0]
    return sorted(
        (int(places[i]), int(flat[i]), int(label)) for i, label in zip(batch.label_positions, batch.labels, strict=True)
    )


@pytest.mark.parametrize("count", [1, 5, 29])
@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(12, 1, 1), (3, 2, 2), (1, 4, 3)])
def test_rows_one_after_the_other_are_the_same_rows_with_the_same_labels(
    count: int, batch_size: int, accumulation: int, world_size: int
) -> None:
    rows = make_rows(count)
    ranks = [
        Batches(rows, batch_size, accumulation, world_size, rank, seed=42, flat=RowLengths.of(rows))
        for rank in range(world_size)
    ]
    most = RowLengths.of(rows).most_tokens(batch_size)
    for index, want in enumerate(steps(rows, batch_size, accumulation, world_size)):
        got = [rank.step(0, index) for rank in ranks]
        assert len({len(rank) for rank in got}) == 1
        ours, theirs = ([batch for rank in step for batch in rank] for step in (got, want))
        assert sorted(row for batch in ours for row in batch.rows) == sorted(row for b in theirs for row in b.rows)
        assert sorted(x for b in ours for x in learnt(b)) == sorted(x for b in theirs for x in learnt(b))
        assert sum(b.tokens for b in ours) == sum(b.tokens for b in theirs)
        assert max(len(batch.rows) for batch in ours) <= batch_size
        assert all(b.input_ids.numel() <= most for b in ours)
        for b in ours:
            if b.segments is not None:
                assert b.input_ids.shape == (1, sum(b.segments.lengths))
                assert b.input_ids.shape[1] % 16 == 0 or b.input_ids.shape[1] == most


def test_micro_batches_of_a_step_have_about_as_many_tokens() -> None:
    rows = make_rows(64, context_length=100)
    step = [
        batch.tokens
        for rank in range(2)
        for batch in Batches(rows, 8, 4, 2, rank, 0, flat=RowLengths.of(rows)).step(0, 0)
    ]
    assert max(step) - min(step) <= 20
    padded = [batch.tokens for rank in range(2) for batch in Batches(rows, 8, 4, 2, rank, 0).step(0, 0)]
    assert max(padded) - min(padded) > 300


def test_rows_of_about_one_length_stay_a_batch() -> None:
    rows = make_rows(40, context_length=3)
    batch = Batches(rows, 8, 1, 1, 0, 0, flat=RowLengths.of(rows)).step(0, 0)[0]
    assert batch.segments is None
    assert batch.input_ids.shape == (8, 3)


@pytest.mark.parametrize(
    ("lengths", "batch_size", "packed", "flat"),
    [
        ([100, 20, 60, 90, 30, 70], 1, False, False),
        ([100, 20, 60, 90, 30, 70], 2, False, True),
        ([60, 40, 50, 45, 30, 70], 1, True, True),
        ([120, 119, 117, 120], 2, False, False),
        ([90, 91, 92, 93], 2, True, False),  # a bin of each
        ([40, 40, 40, 40], 1, True, False),
        ([10] * 8, 4, False, True),  # 4 x 16 are more than the rows take one after the other
        ([33] * 6, 1, True, True),  # three of 40 as well, in a bin of 100
        ([100] * 36 + [20] * 4, 2, False, False),  # four of five micro-batches are of rows that were cut
        ([100] * 36 + [20] * 4, 8, False, True),  # two of five
        ([100] * 30 + [20] * 10, 1, True, False),  # 30 bins of one row, and 2 of five
        ([100] * 8 + [20] * 160, 1, True, True),  # of 40 bins 32
    ],
)
def test_rows_are_flat_where_micro_batches_are(lengths: list[int], batch_size: int, packed: bool, flat: bool) -> None:
    rows = of_lengths(lengths, 120 if max(lengths) > 100 else 100)
    bins = Bins(rows.context_length, rows.lengths) if packed else None
    known = RowLengths.of(rows, bins)
    batches = Batches(rows, batch_size, 1, 1, 0, 0, flat=known)
    found = [batch.segments is not None for i in range(batches.steps_per_epoch) for batch in batches.step(0, i)]
    assert known.flat(batch_size) == flat
    assert sum(found) > len(found) / 2 if flat else sum(found) < len(found) / 2


def test_a_long_row_to_evaluate_on_changes_no_micro_batch_that_trains() -> None:
    rows = of_lengths([10] * 8, 100)
    known = RowLengths.of(rows)
    planned = replace(known, widest=96, at_least=96)  # as `run_data.lengths_to_plan` makes it of one of 96 tokens
    batches = Batches(rows, 4, 1, 1, 0, 0, flat=known)
    assert all(batch.segments is not None for i in range(2) for batch in batches.step(0, i))
    assert planned.most_tokens(4) == 96
    assert planned.flat(4)


def test_the_most_tokens_of_a_micro_batch_are_those_of_the_longest_rows() -> None:
    rows = make_rows(29, context_length=40)
    longest = sorted(rows.lengths.tolist())[-4:]
    assert sum(longest) <= RowLengths.of(rows).most_tokens(4) < min(sum(longest) + 16, 4 * 40 + 1)
    assert RowLengths.of(rows).most_tokens(100) >= rows.lengths.sum()
    assert RowLengths.of(rows, Bins(40, rows.lengths)).most_tokens(4) == 160


def test_the_mean_of_the_keys_that_are_seen() -> None:
    rows = make_rows(29, context_length=40)
    for window in (None, 7):
        seen = [min(i + 1, window or 1000) for length in rows.lengths for i in range(length)]
        assert RowLengths.of(rows).keys(window) == pytest.approx(np.mean(seen), rel=1e-12)
