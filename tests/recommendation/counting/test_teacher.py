"""Targets from a count, by hand and against a plain definition."""

import numpy as np
import pytest
import torch
from scipy import sparse

from common.errors import ConfigError
from recommendation.counting import teacher
from recommendation.counting.counts import Counts
from recommendation.counting.teacher import CountTeacher
from recommendation.models.abstract_model import PADDING
from recommendation.models.item_loss import item_loss
from tests.errors import refused

from ..conftest import windows_of

POPULARITY = np.array([3, 0, 1, 2, 4])
MATRIX = np.array([[0, 2, 1, 0, 0], [0, 0, 3, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 2], [0, 0, 0, 1, 0]], np.float32)
RECENCY = 0.5
ROWS = [[0, 1, 3, 4], [2, 0, 1], [2, 2]]


def teacher_of(weight: float, unseen: bool = False, num_newest: int = 2, temperature: float = 1.0) -> CountTeacher:
    counts = Counts(len(MATRIX))
    counts.fill(sparse.csr_matrix(MATRIX), POPULARITY, num_newest, RECENCY)
    return CountTeacher(counts, weight, unseen, temperature)


def expected(history: list[int], num_newest: int = 2, unseen: bool = False, temperature: float = 1.0) -> np.ndarray:
    """The distribution of the teacher after a history, from its definition."""
    scores = sum(RECENCY ** lag * MATRIX[item] for lag, item in enumerate(history[::-1][:num_newest]))
    popular = (POPULARITY + 1) / (POPULARITY + 1).sum()
    found = 0.98 * scores / scores.sum() + 0.02 * popular if scores.sum() else popular
    found = found ** (1 / temperature)
    if unseen:
        found[history] = 0
    return found / found.sum()


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize(("num_newest", "temperature"), [
    (1, 1.0), (2, 1.0), (50, 1.0), (2, 0.125), (2, 0.02), (50, 3.0)])
def test_the_distributions_are_those_of_the_history_before_each_target(unseen, num_newest, temperature):
    windows, weight = windows_of(*ROWS), 0.7
    found = teacher_of(weight, unseen, num_newest, temperature).distributions(windows.items)
    for row, items in enumerate(ROWS):
        for place in range(len(items) - 1):
            wanted = weight * expected(items[:place + 1], num_newest, unseen, temperature)
            wanted[items[place + 1]] += 1 - weight
            assert found[place, row].numpy() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("unit", ["sequence", "target"])
@pytest.mark.parametrize(("temperature", "large", "unseen"), [
    (1.0, True, False), (1.0, False, False), (0.5, False, False), (0.5, False, True)])
def test_targets_are_drawn_from_the_distributions(unit, temperature, large, unseen):
    weight, num_draws = 0.8, 20_000
    torch.manual_seed(0)
    taught = teacher_of(weight, unseen, temperature=temperature)
    taught.gives_distributions = not large
    windows = windows_of(*ROWS[:2])._replace(teacher=taught)
    windows = windows._replace(items=windows.items.repeat(num_draws, 1), lengths=windows.lengths.repeat(num_draws))
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


def test_large_catalogues_have_no_other_temperature(monkeypatch):
    monkeypatch.setattr(teacher, "MAX_DISTRIBUTION_ITEMS", 4)
    counts = Counts(5)
    assert not CountTeacher(counts, 0.5, False).gives_distributions
    with refused(ConfigError, "--teacher_temperature", names=[0.5, 5], fix=["--teacher_temperature 1"]):
        CountTeacher(counts, 0.5, False, 0.5)


@pytest.mark.parametrize("large", [True, False])
def test_seen_items_are_not_drawn_and_padding_stays(large):
    torch.manual_seed(0)
    taught = teacher_of(1.0, unseen=True)
    taught.gives_distributions = not large
    windows = windows_of([0, 1, 3, 4], [3, 0], [4])._replace(teacher=taught)
    for _ in range(200):
        found = windows.next_items()
        assert found[1, 1:].tolist() == [PADDING] * 2
        assert found[2].tolist() == [PADDING] * 3
        for place, target in enumerate(found[0].tolist()):
            assert target not in [0, 1, 3, 4][:place + 1]


@pytest.mark.parametrize("large", [True, False])
def test_without_entries_the_targets_are_drawn_from_the_popularity(large):
    counts = Counts(5)
    counts.fill(sparse.csr_matrix((5, 5), dtype=np.float32), POPULARITY, 2, RECENCY)
    torch.manual_seed(0)
    taught = CountTeacher(counts, 1.0, unseen=False, temperature=1.0)
    taught.gives_distributions = not large
    windows = windows_of([0, 1])._replace(teacher=taught)
    windows = windows._replace(items=windows.items.repeat(20_000, 1), lengths=windows.lengths.repeat(20_000))
    shares = np.bincount(windows.next_items()[:, 0].numpy(), minlength=5) / 20_000
    assert shares == pytest.approx((POPULARITY + 1) / (POPULARITY + 1).sum(), abs=0.015)


def test_after_the_whole_catalogue_the_next_item_is_the_target():
    windows = windows_of([0, 1, 2, 3, 4, 2])
    found = teacher_of(0.7, unseen=True).distributions(windows.items)
    assert found.sum(dim=2)[:, 0].tolist() == pytest.approx([1.0] * 5)
    assert found[4, 0].tolist() == [0, 0, 1, 0, 0]


def test_without_weight_the_targets_are_the_next_items():
    windows = windows_of(*ROWS)
    taught = windows._replace(teacher=teacher_of(0.0))
    assert torch.equal(taught.next_items(), windows.next_items())
    assert all(map(torch.equal, taught.split_last(), windows.split_last()))


def test_the_loss_of_the_distributions_is_the_mean_loss_of_drawn_targets():
    torch.manual_seed(0)
    windows, taught = windows_of(*ROWS), teacher_of(0.6)
    scores = torch.randn(windows.items.shape[1] - 1, len(ROWS), len(MATRIX))
    exact = item_loss(scores, windows._replace(teacher=taught), 0.0).item()
    taught.gives_distributions = False
    drawn = [item_loss(scores, windows._replace(teacher=taught), 0.0).item() for _ in range(1_000)]
    assert exact == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / len(drawn) ** 0.5)
    assert exact != pytest.approx(item_loss(scores, windows, 0.0).item(), abs=0.01)
