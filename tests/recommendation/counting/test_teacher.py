"""Targets from a count, by hand and against a plain definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

from recommendation.counting import teacher
from recommendation.counting.counts import Counts
from recommendation.counting.teacher import CountTeacher, UserEvents
from recommendation.models.abstract_model import PADDING, Windows
from recommendation.models.item_loss import item_loss

from ..conftest import windows_of

POPULARITY = np.array([3, 0, 1, 2, 4])
MATRIX = np.array([[0, 2, 1, 0, 0], [0, 0, 3, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 2], [0, 0, 0, 1, 0]], np.float32)
RECENCY = 0.5
ROWS = [[0, 1, 3, 4], [2, 0, 1], [2, 2]]


def counts_of(matrix: np.ndarray, popularity: np.ndarray, num_newest: int, recency: float) -> Counts:
    counts = Counts(len(matrix))
    counts.fill(sparse.csr_matrix(matrix), popularity, num_newest, recency)
    return counts


def events_of(rows: list[list[int]]) -> UserEvents:
    """The training events of users. Another event follows those of each user."""
    ends = np.cumsum([len(row) + 1 for row in rows]) - 1
    return UserEvents(torch.tensor(sum([[*row, 0] for row in rows], [])),
                      torch.from_numpy(ends - [len(row) for row in rows]), torch.from_numpy(ends))


def taught(rows: list[list[int]], weight: float, *, unseen: bool = False, num_newest: int = 2,
           temperature: float = 1.0, matrix: np.ndarray = MATRIX) -> Windows:
    """One window for each user, with a teacher."""
    events = events_of(rows)
    made = CountTeacher(counts_of(matrix, POPULARITY, num_newest, RECENCY), events, weight, unseen, temperature)
    return windows_of(*rows)._replace(starts=events.starts, teacher=made)


def expected(history: list[int], num_newest: int = 2, unseen: bool = False, temperature: float = 1.0) -> np.ndarray:
    """The distribution of the teacher after a history, from its definition."""
    scores = sum(RECENCY ** lag * MATRIX[item] for lag, item in enumerate(history[::-1][:num_newest]))
    popular = (POPULARITY + 1) / (POPULARITY + 1).sum()
    found = 0.98 * scores / scores.sum() + 0.02 * popular if scores.sum() else popular
    found = found ** (1 / temperature)
    if unseen:
        found[history] = 0
    return found / found.sum()


def dense(windows: Windows) -> np.ndarray:
    """The distributions of all positions as probabilities of all items: (W - 1, B, N)."""
    items, shares = windows.distributions()
    return torch.zeros(*items.shape[:2], len(MATRIX)).scatter_add(2, items, shares).numpy()


def many(windows: Windows, count: int) -> Windows:
    """Repeat the windows."""
    return windows._replace(items=windows.items.repeat(count, 1), lengths=windows.lengths.repeat(count),
                            starts=windows.starts.repeat(count))


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize(("num_newest", "temperature"), [
    (1, 1.0), (2, 1.0), (50, 1.0), (2, 0.125), (2, 0.02), (50, 3.0)])
def test_the_distributions_are_those_of_the_history_before_each_target(unseen, num_newest, temperature):
    weight = 0.7
    found = dense(taught(ROWS, weight, unseen=unseen, num_newest=num_newest, temperature=temperature))
    for row, items in enumerate(ROWS):
        for place in range(len(items) - 1):
            wanted = weight * expected(items[:place + 1], num_newest, unseen, temperature)
            wanted[items[place + 1]] += 1 - weight
            assert found[place, row] == pytest.approx(wanted, abs=1e-6)


def test_a_window_that_begins_later_has_the_distributions_of_the_whole_history():
    whole = taught(ROWS[:1], 0.7)
    part = whole._replace(items=whole.items[:, 2:], lengths=whole.lengths - 2, starts=whole.starts + 2)
    assert np.array_equal(dense(part), dense(whole)[2:])


@pytest.mark.parametrize(("num_newest", "recency"), [(3, 0.6), (4, 1.0), (50, 0.9)])
def test_long_histories_have_the_probabilities_of_the_count(num_newest, recency, monkeypatch):
    monkeypatch.setattr(teacher, "BLOCK_SCORES", 3 * 40)  # three users at a time
    rng = np.random.default_rng(0)
    matrix = sparse.random(40, 40, 0.1, random_state=0, dtype=np.float32).toarray()
    matrix[rng.random(40) < 0.4] = 0  # many histories have no scores
    counts = counts_of(matrix, rng.integers(0, 9, 40), num_newest, recency)
    rows = [rng.integers(40, size=size).tolist() for size in (30, 1, 2, 25, 7, 18, 30, 3)]
    events = events_of(rows)
    found = CountTeacher(counts, events, 1.0, False, 1.0)
    for start, row in zip(events.starts.tolist(), rows, strict=True):
        for place in range(1, len(row)):
            items, shares = found.distributions(torch.tensor(start + place), torch.tensor(row[place]))
            wanted = counts.log_probabilities(*windows_of(row[:place])[:2])[0].exp()
            assert torch.zeros(40).scatter_add(0, items, shares).tolist() == pytest.approx(wanted.tolist(), abs=2e-6)


@pytest.mark.parametrize(("name", "limit"), [("NUM_LIKELY", 2), ("LIST_BYTES", 2 * 8 * len(events_of(ROWS).items))])
def test_only_the_most_likely_items_are_drawn(name, limit, monkeypatch):
    monkeypatch.setattr(teacher, name, limit)
    windows = taught(ROWS, 1.0)
    assert windows.distributions()[0].shape[2] == 1 + 2  # the target and two items
    wanted = expected([0, 1])
    wanted[np.argsort(wanted)[:-2]] = 0
    assert dense(windows)[1, 0] == pytest.approx(wanted / wanted.sum(), abs=1e-6)


@pytest.mark.parametrize("unit", ["sequence", "target"])
@pytest.mark.parametrize(("temperature", "unseen"), [(1.0, False), (0.5, False), (0.5, True)])
def test_targets_are_drawn_from_the_distributions(unit, temperature, unseen):
    weight, num_draws = 0.8, 20_000
    torch.manual_seed(0)
    windows = many(taught(ROWS[:2], weight, temperature=temperature, unseen=unseen), num_draws)
    for row, items in enumerate(ROWS[:2]):
        if unit == "target":
            drawn, places = windows.split_last()[1][row::2], [len(items) - 2]
        else:
            drawn, places = windows.next_items()[row::2], range(len(items) - 1)
        for column, place in enumerate(places):
            wanted = weight * expected(items[:place + 1], unseen=unseen, temperature=temperature)
            wanted[items[place + 1]] += 1 - weight
            shares = np.bincount(drawn[:, column].numpy(), minlength=len(wanted)) / num_draws
            assert shares == pytest.approx(wanted, abs=0.015)


def test_seen_items_are_not_drawn_and_padding_stays():
    torch.manual_seed(0)
    windows = taught([[0, 1, 3, 4], [3, 0], [4]], 1.0, unseen=True)
    for _ in range(200):
        found = windows.next_items()
        assert found[1, 1:].tolist() == [PADDING] * 2
        assert found[2].tolist() == [PADDING] * 3
        for place, target in enumerate(found[0].tolist()):
            assert target not in [0, 1, 3, 4][:place + 1]


def test_without_entries_the_targets_are_drawn_from_the_popularity():
    torch.manual_seed(0)
    windows = many(taught([[0, 1]], 1.0, matrix=np.zeros((5, 5), np.float32)), 20_000)
    shares = np.bincount(windows.next_items()[:, 0].numpy(), minlength=5) / 20_000
    assert shares == pytest.approx((POPULARITY + 1) / (POPULARITY + 1).sum(), abs=0.015)


def test_after_the_whole_catalogue_the_next_item_is_the_target():
    found = dense(taught([[0, 1, 2, 3, 4, 2]], 0.7, unseen=True))
    assert found.sum(axis=2)[:, 0].tolist() == pytest.approx([1.0] * 5)
    assert found[4, 0].tolist() == [0, 0, 1, 0, 0]


def test_without_weight_the_targets_are_the_next_items():
    windows, plain = taught(ROWS, 0.0), windows_of(*ROWS)
    assert torch.equal(windows.next_items(), plain.next_items())
    assert all(map(torch.equal, windows.split_last(), plain.split_last()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_the_distributions(smoothing):
    torch.manual_seed(0)
    windows = taught(ROWS, 0.6)
    scores = torch.randn(windows.items.shape[1] - 1, len(ROWS), len(MATRIX), requires_grad=True)
    found = item_loss(scores, windows, smoothing)
    counted = (windows.items[:, 1:] != PADDING).T
    wanted = F.cross_entropy(scores[counted], torch.from_numpy(dense(windows))[counted], label_smoothing=smoothing)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (found, wanted)))
    assert found.item() != pytest.approx(item_loss(scores, windows_of(*ROWS), smoothing).item(), abs=0.01)
