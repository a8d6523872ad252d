"""Histories by hand; the windows of a training epoch."""

from collections import Counter

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.artifacts import DatasetFolder, Interactions
from common.errors import ArtifactError, DataError
from common.publishing import publish
from recommendation.dataset import Sequences, TrainingBatches, find_leak
from recommendation.models.abstract_model import PADDING
from tests.errors import refused

from .conftest import leave_one_out

# Events:   0   1   2   3   4     5   6     7     8   9   10
HISTORIES = [[5, 6, 0, 7, 8], [0, 9], [3], [2, 0, 1]]


def test_positions_are_the_events_with_a_history():
    sequences = leave_one_out(HISTORIES)
    assert sequences.positions("train").tolist() == [1, 2, 6]  # 0, 5, 7 and 8 begin a user
    assert sequences.positions("valid").tolist() == [3, 9]
    assert sequences.positions("test").tolist() == [4, 10]


def test_events_without_a_history_are_counted():
    sequences = Sequences(np.arange(6), np.array([0, 0, 1, 2, 2, 3]), np.array([0, 2, 2, 1, 2, 0], dtype=np.int8))
    assert [sequences.num_without_history(split) for split in ("train", "valid", "test")] == [2, 1, 1]


def test_a_history_has_the_earlier_items_oldest_first():
    sequences = leave_one_out(HISTORIES)
    histories = sequences.histories(np.array([4, 6, 9, 10]), max_history=10)
    assert histories.items.tolist() == [[5, 6, 0, 7], [0, -1, -1, -1], [2, -1, -1, -1], [2, 0, -1, -1]]
    assert histories.lengths.tolist() == [4, 1, 1, 2]


def test_a_long_history_loses_its_oldest_items():
    histories = leave_one_out(HISTORIES).histories(np.array([4, 10]), max_history=2)
    assert histories.items.tolist() == [[0, 7], [2, 0]]


def test_windows_by_hand():
    windows = leave_one_out(HISTORIES).windows(np.array([1, 5, 8]), np.array([4, 7, 9]))
    assert windows.items.tolist() == [[6, 0, 7], [0, 9, -1], [2, -1, -1]]
    assert windows.lengths.tolist() == [3, 2, 1]


def test_padding_is_not_an_item():
    assert PADDING < 0


def test_training_sequences_are_the_training_events_of_each_user():
    items, offsets = leave_one_out(HISTORIES).training_sequences()
    assert items.tolist() == [5, 6, 0, 0, 9, 3, 2]
    assert offsets.tolist() == [0, 3, 5, 6, 7]


def test_a_user_without_training_events_has_an_empty_sequence():
    sequences = Sequences(np.array([4, 5, 6]), np.array([0, 1, 1]), np.array([2, 0, 0], dtype=np.int8))
    items, offsets = sequences.training_sequences()
    assert items.tolist() == [5, 6]
    assert offsets.tolist() == [0, 0, 2]


def written(tmp_path, rows: str) -> DatasetFolder:
    """A dataset of the given `(user, item, timestamp, split)` rows."""
    folder = DatasetFolder(tmp_path, "Tiny")
    query = f'SELECT *, 5 AS rating FROM (VALUES {rows}) AS t("user", item, "timestamp", split)'
    publish(folder.interactions, lambda path: duckdb.sql(query).write_parquet(str(path)), {"inputs": {}})
    return folder


def test_events_are_read_in_the_order_of_the_file(tmp_path):
    folder = written(tmp_path, "(0, 4, 10, 'train'), (0, 2, 10, 'valid'), (0, 3, 11, 'test'), (1, 0, 5, 'train')")
    sequences = Sequences.load(folder, "cpu")
    assert sequences.item.tolist() == [4, 2, 3, 0]
    assert sequences.user.tolist() == [0, 0, 0, 1]
    assert sequences.split.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("splits", [("test", "train"), ("valid", "train"), ("test", "valid")])
def test_a_user_whose_splits_are_out_of_order_is_refused(tmp_path, splits):
    folder = written(tmp_path, f"(0, 4, 1, 'train'), (0, 2, 2, '{splits[0]}'), (0, 3, 3, '{splits[1]}')")
    with refused(ArtifactError, folder.interactions, names=[1, "train", "valid"],
                 fix=[f"bash dataloader/run_pipeline.sh --dataset Tiny --data_root {tmp_path}"]):
        Sequences.load(folder, "cpu")
    written(tmp_path, f"(0, 4, 1, 'train'), (0, 2, 2, '{splits[1]}'), (0, 3, 3, '{splits[0]}')")
    assert len(Sequences.load(folder, "cpu").split) == 3


def test_another_user_may_train_after_a_test_event(tmp_path):
    folder = written(tmp_path, "(0, 4, 1, 'train'), (0, 2, 2, 'test'), (1, 3, 0, 'train')")
    assert Sequences.load(folder, "cpu").split.tolist() == [0, 2, 0]


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
        items, lengths = batches.get(epoch, index)
        assert all((row[length:] == PADDING).all() for row, length in zip(items, lengths, strict=True))
        result.append([row[:length].tolist() for row, length in zip(items, lengths, strict=True)])
    return result


def targets_of(histories: list[list[int]]) -> list[int]:
    """Training events with a history, by hand."""
    return [item for items in histories for item in (items[:-2] if len(items) > 2 else items)[1:]]


@pytest.mark.slow
@settings(max_examples=200)
@given(training())
def test_target_windows_are_each_training_event_after_its_history(case):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), "target", batch_size, max_history, seed)
    before = {item: items[:place][-max_history:] for items in histories for place, item in enumerate(items)}
    rows = [row for batch in rows_of(batches, 0) for row in batch]
    assert sorted(row[-1] for row in rows) == targets_of(histories)
    assert all(row[:-1] == before[row[-1]] for row in rows)


@pytest.mark.slow
@settings(max_examples=200)
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
@settings(max_examples=200)
@given(training(), st.sampled_from(["target", "sequence"]))
def test_training_windows_have_no_valid_or_test_events(case, unit):
    histories, batch_size, max_history, seed = case
    held_out = {item for items in histories if len(items) > 2 for item in items[-2:]}
    batches = TrainingBatches(leave_one_out(histories), unit, batch_size, max_history, seed)
    seen = {item for batch in rows_of(batches, 0) for row in batch for item in row}
    assert not seen & held_out


@pytest.mark.slow
@settings(max_examples=200)
@given(training(), st.sampled_from(["target", "sequence"]))
def test_every_epoch_has_all_batches_and_none_is_empty(case, unit):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), unit, batch_size, max_history, seed)
    for epoch in range(4):
        assert all(rows_of(batches, epoch))


@pytest.mark.slow
@settings(max_examples=200)
@given(training())
def test_target_batches_differ_in_size_by_at_most_one(case):
    histories, batch_size, max_history, seed = case
    batches = TrainingBatches(leave_one_out(histories), "target", batch_size, max_history, seed)
    sizes = [len(batch) for batch in rows_of(batches, 0)]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert batches.num_batches == -(-len(targets_of(histories)) // batch_size)


@pytest.fixture
def long_histories() -> list[list[int]]:
    starts = range(0, 1200, 60)
    return [list(range(start, start + 60)) for start in starts]


def test_sequence_batches_hold_about_batch_size_targets(long_histories):
    batches = TrainingBatches(leave_one_out(long_histories), "sequence", batch_size=100, max_history=10, seed=0)
    sizes = [sum(len(row) - 1 for row in batch) for batch in rows_of(batches, 0)]
    assert sum(sizes) == 20 * 57
    assert max(sizes) <= 100 + 10


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


def events(user: list[int], timestamp: list[int], split: list[int]) -> Interactions:
    return Interactions(np.array(user), np.zeros(len(user), dtype=np.int64), np.array(timestamp),
                        np.array(split, dtype=np.int8))


@pytest.mark.parametrize(("split_name", "user", "timestamp", "split"), [
    (None, [0, 0, 0, 1], [1, 2, 3, 9], [0, 1, 2, 0]),
    ("leave_one_out", [0, 0, 0, 1, 1, 1], [1, 2, 3, 1, 2, 3], [0, 1, 2, 0, 1, 2]),
    ("temporal", [0, 0, 1, 1], [1, 5, 2, 6], [0, 1, 0, 2])])
def test_splits_without_a_leak_are_accepted(split_name, user, timestamp, split):
    assert find_leak(events(user, timestamp, split), split_name) is None


# Each of these breaks one rule, so that no other check finds it.
@pytest.mark.parametrize(("split_name", "user", "timestamp", "split", "names"), [
    ("leave_one_out", [0, 0, 0, 0], [1, 2, 3, 4], [0, 1, 2, 2], ["test", "leave_one_out"]),
    ("leave_one_out", [0, 0, 0, 0], [1, 2, 3, 4], [0, 1, 1, 2], ["valid", "leave_one_out"]),
    ("temporal", [0, 0, 1, 1], [1, 5, 5, 6], [0, 1, 0, 2], ["temporal"])])
def test_splits_that_leak_are_found(split_name, user, timestamp, split, names):
    problem = find_leak(events(user, timestamp, split), split_name)
    assert problem
    assert all(name in problem for name in names)
