"""The windows of a training epoch, and their batches."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data_parallel import WHOLE, Shard
from common.errors import DataError
from recommendation.batches import TrainingBatches
from recommendation.models.abstract_model import PADDING
from tests.errors import refused

from .conftest import leave_one_out


@st.composite
def training(draw):
    """Users whose items have consecutive numbers, one for each event; batch size; longest history; seed."""
    lengths = draw(st.lists(st.integers(1, 15), max_size=12)) + [5]  # so that a user has a training target
    starts = np.cumsum([0, *lengths])
    histories = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    return histories, draw(st.integers(1, 20)), draw(st.integers(1, 8)), draw(st.integers(0, 100))


def rows_of(batches: TrainingBatches, epoch: int) -> list[list[list[int]]]:
    """Each batch's windows as lists of items without padding."""
    result = []
    for index in range(batches.num_batches):
        items, lengths, starts, _ = batches.get(epoch, index, WHOLE)
        assert all((row[length:] == PADDING).all() for row, length in zip(items, lengths, strict=True))
        rows = [row[:length].tolist() for row, length in zip(items, lengths, strict=True)]
        assert all(rows[:batches.num_windows(epoch, index)])
        assert not any(rows[batches.num_windows(epoch, index):])
        newest = starts + lengths - 1  # event of the last item of each window
        assert [row[-1] for row in rows if row] == batches.sequences.device_items[newest[lengths > 0]].tolist()
        result.append(rows[:batches.num_windows(epoch, index)])
    return result


def targets_of(histories: list[list[int]]) -> list[int]:
    """Training events with a history, by hand."""
    return [item for items in histories for item in (items[:-2] if len(items) > 2 else items)[1:]]


@pytest.mark.slow
@settings(max_examples=60)
@given(training())
def test_target_windows_are_each_training_event_after_its_history(case):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), "target", batch_size, max_history, seed)
    before = {item: items[:place][-max_history:] for items in histories for place, item in enumerate(items)}
    rows = [row for batch in rows_of(batches, 0) for row in batch]
    assert sorted(row[-1] for row in rows) == targets_of(histories)
    assert all(row[:-1] == before[row[-1]] for row in rows)


@pytest.mark.slow
@settings(max_examples=60)
@given(training())
def test_sequence_windows_cover_each_training_target_once(case):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), "sequence", batch_size, max_history, seed)
    for epoch in range(3):
        rows = [row for batch in rows_of(batches, epoch) for row in batch]
        assert sorted(item for row in rows for item in row[1:]) == targets_of(histories)
        assert all(2 <= len(row) <= max_history + 1 for row in rows)
        assert all(row == list(range(row[0], row[0] + len(row))) for row in rows)  # consecutive events ...
        assert all(row[0] + 1 in targets_of(histories) for row in rows)            # ... of one user


@pytest.mark.slow
@settings(max_examples=60)
@given(training(), st.sampled_from(["target", "sequence"]))
def test_training_windows_have_no_valid_or_test_events(case, unit):
    histories, batch_size, max_history, seed = case
    held_out = {item for items in histories if len(items) > 2 for item in items[-2:]}
    batches = TrainingBatches(leave_one_out(histories), unit, batch_size, max_history, seed)
    seen = {item for batch in rows_of(batches, 0) for row in batch for item in row}
    assert not seen & held_out


@pytest.mark.slow
@settings(max_examples=60)
@given(training(), st.sampled_from(["target", "sequence"]))
def test_every_epoch_has_all_batches_and_none_is_empty(case, unit):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), unit, batch_size, max_history, seed)
    for epoch in range(4):
        assert all(rows_of(batches, epoch))


@pytest.mark.slow
@settings(max_examples=60)
@given(training())
def test_target_batches_have_about_batch_size_rows_and_no_empty_row(case):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), "target", batch_size, max_history, seed)
    sizes = [len(batch) for batch in rows_of(batches, 0)]
    num_targets = len(targets_of(histories))
    assert abs(batches.num_batches - num_targets / batch_size) <= 1
    assert max(sizes) <= 1.5 * batch_size
    assert sizes == [len(batches.get(0, index, WHOLE).items) for index in range(batches.num_batches)]


@pytest.mark.slow
@settings(max_examples=60)
@given(training(), st.sampled_from(["target", "sequence"]))
def test_every_epoch_has_the_same_shapes(case, unit):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), unit, batch_size, max_history, seed)
    expected = Counter({(shape.rows, shape.width + 1): shape.num_batches for shape in batches.shapes})
    assert len(expected) <= 16
    for epoch in range(3):
        assert Counter(tuple(batches.get(epoch, index, WHOLE).items.shape)
                       for index in range(batches.num_batches)) == expected


@pytest.mark.slow
@settings(max_examples=60)
@given(training(), st.sampled_from(["target", "sequence"]), st.integers(1, 4))
def test_the_shards_of_a_batch_have_its_windows(case, unit, num_shards):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), unit, batch_size, max_history, seed)
    for index, rows in enumerate(rows_of(batches, 0)):
        if num_shards > len(rows):
            continue
        shards = [Shard(slice(number, None, num_shards), num_shards, len(rows)) for number in range(num_shards)]
        parts = [batches.get(0, index, shard) if num_shards > 1 else batches.get(0, index, WHOLE) for shard in shards]
        found = [(row[:length].tolist(), int(start)) for items, lengths, starts, _ in parts
                 for row, length, start in zip(items, lengths, starts, strict=True) if length]
        assert sorted(found) == sorted((row, row[0]) for row in rows)
        assert sum(batches.num_targets(0, index, shard.rows) for shard in shards) == batches.num_targets(0, index)
        assert batches.users(0, index) == [int(batches.sequences.user[row[0]]) for row in rows]


def test_the_blocks_of_an_epoch_join_without_a_gap(long_histories, monkeypatch):
    whole = TrainingBatches(leave_one_out(long_histories), "sequence", batch_size=100, max_history=10, seed=0)
    expected = [rows_of(whole, epoch) for epoch in range(2)]
    monkeypatch.setattr("recommendation.batches.BLOCK_CELLS", 300)
    small = TrainingBatches(leave_one_out(long_histories), "sequence", batch_size=100, max_history=10, seed=0)
    assert [rows_of(small, epoch) for epoch in range(2)] == expected
    backwards = [small.get(1, index, WHOLE).items.tolist() for index in reversed(range(small.num_batches))]
    assert backwards[::-1] == [whole.get(1, index, WHOLE).items.tolist() for index in range(whole.num_batches)]


@pytest.fixture
def long_histories() -> list[list[int]]:
    starts = range(0, 1200, 60)
    return [list(range(start, start + 60)) for start in starts]


def test_sequence_batches_hold_about_batch_size_targets(long_histories):
    batches = TrainingBatches(leave_one_out(long_histories), "sequence", batch_size=100, max_history=10, seed=0)
    sizes = [sum(len(row) - 1 for row in batch) for batch in rows_of(batches, 0)]
    assert sum(sizes) == 20 * 57
    assert 0.8 * 100 <= min(sizes) <= max(sizes) <= 1.1 * 100


def test_stretches_are_cut_at_other_places_each_epoch(long_histories):
    batches = TrainingBatches(leave_one_out(long_histories), "sequence", batch_size=100, max_history=10, seed=0)
    starts = [{row[0] for batch in rows_of(batches, epoch) for row in batch} for epoch in range(30)]
    assert starts[0] != starts[1]
    # After 30 epochs, stretches have started at every training event but the last one of a user.
    begun = Counter(start % 60 for epoch in starts for start in epoch)
    assert set(begun) == set(range(57))


@pytest.mark.slow
def test_short_sequences_are_split_less_often():
    mixed = [list(range(12)), list(range(100, 105))]  # 9 and 2 training targets
    batches = TrainingBatches(leave_one_out(mixed), "sequence", batch_size=4, max_history=9, seed=0)
    epochs = [[row for batch in rows_of(batches, epoch) for row in batch] for epoch in range(900)]
    assert sum(list(range(10)) in rows for rows in epochs) == pytest.approx(900 / 9, abs=40)  # unsplit in one of 9
    assert sum(list(range(100, 103)) in rows for rows in epochs) == pytest.approx(900 * 8 / 9, abs=40)
    assert all(len(rows) <= 4 for rows in epochs)


@pytest.mark.parametrize("unit", ["target", "sequence"])
def test_batches_are_a_function_of_seed_and_epoch(long_histories, unit):
    def epoch_of(seed: int, epoch: int):
        return rows_of(TrainingBatches(leave_one_out(long_histories), unit, 100, 10, seed), epoch)

    batches = TrainingBatches(leave_one_out(long_histories), unit, 100, 10, seed=0)
    first, second = rows_of(batches, 0), rows_of(batches, 1)
    assert rows_of(batches, 0) == first == epoch_of(0, 0)
    assert second == epoch_of(0, 1) != first
    assert epoch_of(1, 0) != first


def test_batches_have_similar_lengths(long_histories):
    batches = TrainingBatches(leave_one_out(long_histories), "target", batch_size=50, max_history=50, seed=0)
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in rows_of(batches, 0)]
    assert np.mean(spread) < 5


def test_no_batch_pads_short_stretches_to_a_long_one():
    mixed = [list(range(60 + user % 3)) if user % 4 == 0 else [0, 1, 2, 3, 4] for user in range(800)]
    batches = TrainingBatches(leave_one_out(mixed), "sequence", batch_size=50, max_history=50, seed=0)
    cells = [len(batch) * max(map(len, batch)) for batch in rows_of(batches, 0)]
    assert max(cells) <= 4 * np.median(cells)


def test_training_events_without_any_history_are_refused():
    with refused(DataError, "interactions.parquet", names=["--min_user_interactions"]):
        TrainingBatches(leave_one_out([[0, 1, 2], [3]]), "target", 4, 5, seed=0)
