"""Metrics by hand and against a brute-force count."""

import math

import numpy as np
import pytest
import torch

from recommendation.evaluator import CUTOFFS, Predictions, metrics, predict
from recommendation.models.abstract_model import AbstractRecommender, Catalogue, Recommendations

from .conftest import leave_one_out


def predictions(items: list[list[int]], targets: list[int]) -> Predictions:
    items = np.array(items)
    return Predictions(np.arange(len(targets)), np.array(targets), items, np.zeros(items.shape))


def brute_force(items: list[list[int]], targets: list[int]) -> dict:
    figures: dict = {}
    for cutoff in (5, 10, 20):
        recall, ndcg = [], []
        for row, target in zip(items, targets, strict=True):
            rank = next((place for place, item in enumerate(row, start=1) if item == target), None)
            found = rank is not None and rank <= cutoff
            recall.append(1.0 if found else 0.0)
            ndcg.append(1 / math.log2(rank + 1) if found else 0.0)
        for name, values in (("recall", recall), ("ndcg", ndcg)):
            mean = sum(values) / len(values)
            figures[f"{name}@{cutoff}"] = mean
            figures[f"{name}@{cutoff}_stderr"] = math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
    return figures


def row_with(target: int, rank: int) -> list[int]:
    """Twenty items with 7 at the given rank (1 is the best)."""
    row = list(range(100, 120))
    row[rank - 1] = target
    return row


def test_the_figures_have_their_cutoffs():
    assert CUTOFFS == (5, 10, 20)


def test_metrics_by_hand():
    figures = metrics(predictions([row_with(7, 1), row_with(7, 3), row_with(7, 6), row_with(7, 20)], [7] * 4))
    assert figures["num_targets"] == 4
    assert (figures["recall@5"], figures["recall@10"], figures["recall@20"]) == (0.5, 0.75, 1.0)
    assert figures["ndcg@5"] == pytest.approx((1 + 1 / 2) / 4)
    assert figures["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(7)) / 4)
    assert figures["ndcg@20"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(7) + 1 / math.log2(21)) / 4)


def test_standard_errors_by_hand():
    # Three of four found: a standard deviation of sqrt(3/4 * 1/4), over sqrt(4).
    figures = metrics(predictions([row_with(7, 1)] * 3 + [row_with(8, 1)], [7] * 4))
    assert figures["recall@10_stderr"] == pytest.approx(math.sqrt(3) / 4 / 2)
    assert figures["ndcg@10_stderr"] == pytest.approx(math.sqrt(3) / 4 / 2)


def test_perfect_and_wrong_predictions():
    perfect = metrics(predictions([row_with(7, 1)] * 3, [7] * 3))
    wrong = metrics(predictions([row_with(7, 1)] * 3, [8] * 3))
    for name in ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20"):
        assert (perfect[name], wrong[name]) == (1.0, 0.0)
        assert perfect[f"{name}_stderr"] == wrong[f"{name}_stderr"] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_a_brute_force_count(seed):
    rng = np.random.default_rng(seed)
    items = [rng.permutation(40)[:20].tolist() for _ in range(57)]
    for row in items[::5]:
        row[rng.integers(1, 20):] = [-1] * (20 - len(row[:rng.integers(1, 20)]))
    items = [(row + [-1] * 20)[:20] for row in items]
    targets = rng.integers(40, size=57).tolist()
    figures = metrics(predictions(items, targets))
    for name, value in brute_force(items, targets).items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


def test_the_share_of_invalid_and_of_duplicate_results_by_hand():
    figures = metrics(predictions([[1, 2, 3, 4], [5, 6, 5, 5], [8, 9, -1, -1]], [0] * 3))
    assert figures["invalid_share"] == pytest.approx(2 / 12)
    assert figures["duplicate_share"] == pytest.approx(2 / 12)  # 5 stands thrice, two of them too many


def test_valid_and_distinct_results_have_none_of_either():
    figures = metrics(predictions([list(range(20))] * 2, [0, 30]))
    assert figures["invalid_share"] == figures["duplicate_share"] == 0.0


class Successor(AbstractRecommender):
    """Recommends the items that follow the last one in the order of their ids."""

    needs_codes = False

    def recommend(self, histories, top_k):
        last = histories.items.gather(1, histories.lengths.unsqueeze(1) - 1)
        items = (last + 1 + torch.arange(top_k)) % self.catalogue.num_items
        return Recommendations(items, -torch.arange(top_k, dtype=torch.float32).expand(len(items), -1))


@pytest.fixture
def successor():
    return Successor({}, Catalogue(30, None, []))


@pytest.mark.parametrize("eval_batch_size", [1, 3, 4, 100])
def test_a_short_last_batch_weighs_by_its_users(successor, eval_batch_size):
    # Of seven users one is found at rank 1 and one at rank 2; their histories differ in length.
    histories = [[0, 1, 2, 3], [0, 1, 2, 9, 4, 6], *([8, 8, 8, 8 - step] for step in range(5))]
    params = {"max_history": 3, "top_k": 20, "eval_batch_size": eval_batch_size}
    found = predict(successor, leave_one_out(histories), "test", params)
    assert found.targets.tolist() == [3, 6, 8, 7, 6, 5, 4]
    assert found.items[:, 0].tolist() == [3, 5, 9, 9, 9, 9, 9]
    figures = metrics(found)
    assert figures["num_targets"] == 7
    assert figures["recall@5"] == pytest.approx(2 / 7)
    assert figures["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3)) / 7)


def test_predictions_stand_in_the_order_of_the_file(successor):
    histories = [[0, 1, 2, 3], [5, 5, 5, 5, 5, 5, 5], [9, 9, 9]]
    found = predict(successor, leave_one_out(histories), "test",
                    {"max_history": 10, "top_k": 20, "eval_batch_size": 2})
    assert found.positions.tolist() == [3, 10, 13]
    assert found.targets.tolist() == [3, 5, 9]
    assert found.items[:, 0].tolist() == [3, 6, 10]
    assert found.scores[:, :2].tolist() == [[0, -1]] * 3


def test_the_valid_split_is_predicted_without_the_test_event(successor):
    found = predict(successor, leave_one_out([[0, 4, 2, 3]]), "valid",
                    {"max_history": 10, "top_k": 20, "eval_batch_size": 2})
    assert found.targets.tolist() == [2]
    assert found.items[0, 0] == 5
