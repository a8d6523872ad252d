"""Histories by hand."""

import duckdb
import numpy as np
import pytest

from common.artifacts import DatasetFolder, Interactions
from common.errors import ArtifactError
from common.publishing import publish
from recommendation.dataset import Sequences, find_leak
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
