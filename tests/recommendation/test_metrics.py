"""Metrics by hand and against a brute-force count."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

import recommendation.metrics
from recommendation.compare import compare
from recommendation.evaluator import Predictions, metrics
from recommendation.metrics import CUTOFFS, code_metrics, mean_and_deviation, names
from recommendation.options import read_flags
from recommendation.report import table
from tests.brute_force import brute_force
from tests.docs import METRIC


def predictions(items: list[list[int]], targets: list[int]) -> Predictions:
    items = np.array(items)
    return Predictions(np.arange(len(targets)), np.array(targets), items, np.zeros(items.shape))


def row_with(target: int, rank: int) -> list[int]:
    """Twenty items with the target at the given rank (1 is the best)."""
    row = list(range(100, 120))
    row[rank - 1] = target
    return row


def test_the_metrics_have_their_cutoffs():
    assert CUTOFFS == (1, 5, 10, 20)


def test_models_can_be_selected_by_every_ranking_metric():
    own = [name for name, value in metrics(predictions([row_with(7, 1)], [7]), 200).items()
           if isinstance(value, float) and not name.endswith(("_stderr", "_share"))]
    assert sorted(own) == sorted(names())


def test_metrics_by_hand():
    values = metrics(predictions([row_with(7, 1), row_with(7, 3), row_with(7, 6), row_with(7, 20)], [7] * 4), 200)
    assert values["num_targets"] == 4
    assert values["recall@1"] == values["ndcg@1"] == values["mrr@1"] == 0.25
    assert [values[f"recall@{k}"] for k in (1, 5, 10, 20)] == [0.25, 0.5, 0.75, 1.0]
    assert values["mrr@5"] == pytest.approx((1 + 1 / 3) / 4)
    assert values["mrr@20"] == pytest.approx((1 + 1 / 3 + 1 / 6 + 1 / 20) / 4)
    # Rank one has item 7 and, three times, item 100; the first five ranks also have 101 to 104.
    assert (values["coverage@1"], values["coverage@5"]) == (2 / 200, 6 / 200)
    assert values["ndcg@5"] == pytest.approx((1 + 1 / 2) / 4)
    assert values["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(7)) / 4)
    assert values["ndcg@20"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(7) + 1 / math.log2(21)) / 4)


def test_standard_errors_by_hand():
    # Three of four found: a standard deviation of sqrt(3/4 * 1/4), over sqrt(4).
    values = metrics(predictions([row_with(7, 1)] * 3 + [row_with(8, 1)], [7] * 4), 200)
    assert values["recall@10_stderr"] == pytest.approx(math.sqrt(3) / 4 / 2)
    assert values["ndcg@10_stderr"] == pytest.approx(math.sqrt(3) / 4 / 2)


def test_perfect_and_wrong_predictions():
    perfect = metrics(predictions([row_with(7, 1)] * 3, [7] * 3), 200)
    wrong = metrics(predictions([row_with(7, 1)] * 3, [8] * 3), 200)
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
    values = metrics(predictions(items, targets), 40)
    for name, value in brute_force(items, targets, 40).items():
        assert values[name] == pytest.approx(value, abs=1e-12), name


def test_faults_of_lists_by_hand():
    values = metrics(predictions([[1, 2, 3, 4], [5, 6, 5, 5], [8, 9, -1, -1], [7, 20, 21, -2]], [0] * 4), 20)
    assert values["missing_share"] == pytest.approx(2 / 16)
    assert values["duplicate_share"] == pytest.approx(2 / 16)  # item 5 is there three times, twice too often
    assert values["invalid_share"] == pytest.approx(3 / 16)    # items 20 and 21 of a catalogue of 20, and -2


def test_valid_and_distinct_results_have_no_faults():
    values = metrics(predictions([list(range(20))] * 2, [0, 30]), 200)
    assert values["invalid_share"] == values["duplicate_share"] == 0.0


def test_mean_and_deviation_by_hand():
    values = mean_and_deviation([{"recall@5": 0.1, "recall@5_stderr": 0.5, "num_targets": 3},
                                  {"recall@5": 0.3, "recall@5_stderr": 0.5, "num_targets": 3}])
    assert values == {"recall@5": {"mean": pytest.approx(0.2), "deviation": pytest.approx(0.02**0.5)}}
    assert mean_and_deviation([{"ndcg@5": 0.1}]) == {"ndcg@5": {"mean": 0.1, "deviation": None}}


def test_one_function_adds_a_metric(train, monkeypatch, tmp_path):
    changed = tmp_path / "metrics.py"
    changed.write_text(f"{Path(recommendation.metrics.__file__).read_text()}\n\n{METRIC}")
    monkeypatch.setattr("recommendation.metrics.METRICS", runpy.run_path(str(changed))["METRICS"])

    values = metrics(predictions([row_with(7, 5), row_with(7, 6)], [7, 7]), 200)
    expected = [0, 0.2 * 0.8**4 / 2, 0.2 * (0.8**4 + 0.8**5) / 2, 0.2 * (0.8**4 + 0.8**5) / 2]
    assert [values[f"rbp@{cutoff}"] for cutoff in CUTOFFS] == pytest.approx(expected)
    assert values["rbp@10_stderr"] == pytest.approx(0.2 * (0.8**4 - 0.8**5) / 2 / math.sqrt(2))
    assert read_flags(["--select_by=rbp@20"])[1].training_params["select_by"] == "rbp@20"

    trained = train("popularity")
    of_run = json.loads((trained.run / "metrics.json").read_text())
    lists = [json.loads(line) for line in (trained.run / "predictions.jsonl").read_text().splitlines()]
    tables = [line.split("|") for line in compare(trained.folder, trained.run_root).splitlines() if line[:1] == "|"]
    for protocol, key, (heading, _, row) in zip(("all", "unseen"), ("items", "unseen"), (tables[:3], tables[3:]),
                                                strict=True):
        found = [0.2 * 0.8 ** row[key].index(row["target"]) for row in lists if row["target"] in row[key][:10]]
        value = of_run["alone"]["test"][protocol]["rbp@10"]
        assert value == pytest.approx(sum(found) / len(lists))
        assert found
        assert f"{value:.4f}" in row[[word.strip() for word in heading].index("rbp@10")]


def test_a_metric_that_a_run_lacks_is_empty():
    splits = {"valid": {"all": {}, "unseen": {}},
              "test": {"all": {"recall@10": 0.5, "recall@10_stderr": 0.1}, "unseen": {}}}
    row = table({"older": {"alone": splits, "protocol": "all"}}, {"older": "none"}).splitlines()[-1]
    name, valid, recall, *others = [word.strip() for word in row.split("|")[1:-1]]
    assert (name, valid, recall) == ("older", "", "0.5000 (±0.1000)")
    assert set(others) == {""}


def test_code_hits_by_hand():
    group_of = np.array([0, 0, 1, 1, 2, 3, *range(4, 14)])  # items 0 and 1 have one ID, and so have 2 and 3
    items = np.array([[2, 3, 1, 4, -1, -1], [4, 5, 2, 3, 1, -1], [4, 5, 2, 3, 0, 1], [4, 5, -1, -1, -1, -1]])
    # The lists of IDs are 1 0 2; 2 3 1 0; 2 3 1 0 and 2 3. Item 0 is in none of the first two lists.
    values = code_metrics(items, np.array([0, 0, 3, 3]), group_of)
    assert values["code_recall@10"] == pytest.approx(3 / 4)
    assert values["code_ndcg@10"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5) + 1 / math.log2(4)) / 4)
    # Items 2 and 3 share an ID, so the target at place 11 of the items is at place 10 of the IDs.
    items = np.array([[2, 3, *range(4, 12), 12, 13]])
    assert code_metrics(items, np.array([12]), group_of)["code_ndcg@10"] == pytest.approx(1 / math.log2(11))
    assert code_metrics(items, np.array([13]), group_of) == {"code_recall@10": 0, "code_ndcg@10": 0}
