"""Predictions of a split, and their evaluation."""

import math

import numpy as np
import pytest
import torch

from common.errors import TrainingError
from recommendation.dataset import Sequences
from recommendation.evaluator import by_popularity, cannot_rank, evaluate, metrics, predict, selecting_protocol
from recommendation.models.abstract_model import AbstractRecommender, Catalogue, Recommendations, top_items
from tests.errors import refused

from .conftest import LOSSES, NUM_ITEMS, leave_one_out
from .test_metrics import predictions


class Successor(AbstractRecommender):
    """Recommends the items whose numbers follow the last item's."""

    needs_codes = False

    def recommend(self, histories, top_k):
        last = histories.items.gather(1, histories.lengths.unsqueeze(1) - 1)
        items = (last + 1 + torch.arange(top_k)) % self.catalogue.num_items
        return Recommendations(items, -torch.arange(top_k, dtype=torch.float32).expand(len(items), -1))


@pytest.fixture
def successor():
    return Successor({}, Catalogue(30, None, []))


@pytest.mark.parametrize("eval_batch_size", [1, 3, 4, 100])
def test_a_short_last_batch_is_weighted_by_its_users(successor, eval_batch_size):
    # Of seven users one is found at rank 1 and one at rank 2; their histories differ in length.
    histories = [[0, 1, 2, 3], [0, 1, 2, 9, 4, 6], *([8, 8, 8, 8 - step] for step in range(5))]
    params = {"max_history": 3, "top_k": 20, "eval_batch_size": eval_batch_size}
    found = predict(successor, leave_one_out(histories), "test", params, "all")
    assert found.targets.tolist() == [3, 6, 8, 7, 6, 5, 4]
    assert found.items[:, 0].tolist() == [3, 5, 9, 9, 9, 9, 9]
    values = metrics(found, 30)
    assert values["num_targets"] == 7
    assert values["recall@5"] == pytest.approx(2 / 7)
    assert values["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3)) / 7)


def test_predictions_have_the_order_of_the_file(successor):
    histories = [[0, 1, 2, 3], [5, 5, 5, 5, 5, 5, 5], [9, 9, 9]]
    found = predict(successor, leave_one_out(histories), "test",
                    {"max_history": 10, "top_k": 20, "eval_batch_size": 2}, "all")
    assert found.positions.tolist() == [3, 10, 13]
    assert found.targets.tolist() == [3, 5, 9]
    assert found.items[:, 0].tolist() == [3, 6, 10]
    assert found.scores[:, :2].tolist() == [[0, -1]] * 3


def test_the_valid_split_is_predicted_without_the_test_event(successor):
    found = predict(successor, leave_one_out([[0, 4, 2, 3]]), "valid",
                    {"max_history": 10, "top_k": 20, "eval_batch_size": 2}, "all")
    assert found.targets.tolist() == [2]
    assert found.items[0, 0] == 5


def test_metrics_by_popularity_by_hand():
    # 12 training events: items 3 and 4 have none; 0, 1 and 2 have one each, 5 three, 6 six.
    counts = np.array([1, 1, 1, 0, 0, 3, 6])
    found = predictions([[6, 5, 0], [6, 5, 1], [6, 5, 0], [3, 5, 0], [0, 1, 2]], [6, 6, 1, 3, 5])
    values = by_popularity(found, counts)
    # Items by popularity: 0, 1 and 2 begin within the first four events, 5 at the third, 6 at the sixth.
    assert {name: bucket["num_items"] for name, bucket in values.items()} == {
        "cold": 2, "tail": 4, "middle": 1, "head": 0}
    assert values["cold"] == {"num_items": 2, "num_targets": 1, "recall@10": 1.0, "ndcg@10": 1.0}
    assert values["tail"] == {"num_items": 4, "num_targets": 2, "recall@10": 0.0, "ndcg@10": 0.0}
    assert values["middle"] == {"num_items": 1, "num_targets": 2, "recall@10": 1.0, "ndcg@10": 1.0}
    assert values["head"] == {"num_items": 0, "num_targets": 0, "recall@10": None, "ndcg@10": None}


@pytest.mark.parametrize("eval_batch_size", [1, 2, 100])
def test_filtering_removes_the_whole_history_and_keeps_list_lengths(successor, eval_batch_size):
    # Items 4, 5, ... follow item 3. The first user has seen 4 and 6, long before the two items that the model reads.
    histories = [[6, 4, 9, 0, 3, 5], [9, 9, 9], [1, 2, 3]]
    found = predict(successor, leave_one_out(histories), "test",
                    {"max_history": 2, "top_k": 20, "eval_batch_size": eval_batch_size}, "unseen")
    assert found.items[0].tolist() == [5, 7, 8, *range(10, 27)]
    assert found.items[1, 0] == 10
    assert found.items[2].tolist() == list(range(3, 23))
    assert metrics(found, 30)["recall@1"] == pytest.approx(2 / 3)  # the second user's 9 was seen


def test_a_catalogue_smaller_than_the_list_counts_every_target(make_model):
    popularity = make_model("popularity", of=Catalogue(6, None, []))
    sequences = leave_one_out([[0, 1, 2, 3], [5, 5, 4, 4], [1, 2, 0, 5]])
    popularity.fit(sequences.training_sequences(), sequences.validation_events())
    found = predict(popularity, sequences, "test",
                    {"max_history": 2, "top_k": 20, "eval_batch_size": 2}, "all")
    values = metrics(found, 6)
    assert values["recall@20"] == 1.0  # all three, in lists of six
    assert values["missing_share"] == pytest.approx(14 / 20)
    assert values["invalid_share"] == values["duplicate_share"] == 0.0


class Scored(AbstractRecommender):
    """The same scores for every user."""

    needs_codes = False

    def __init__(self, scores: list[float]):
        super().__init__({}, Catalogue(len(scores), None, []))
        self.scores = torch.tensor(scores)

    def recommend(self, histories, top_k):
        return top_items(self.scores.expand(len(histories.items), -1), top_k)


class Counted(Scored):
    """A model that is not trained by gradient descent."""

    def fit(self, sequences, validation):
        return True


PARAMS = {"max_history": 3, "top_k": 20, "eval_batch_size": 3}


def test_among_equal_scores_the_smaller_item_comes_first():
    found = predict(Scored([0.0] * 30), leave_one_out([[1, 2, 3], [4, 5, 29]]), "test", PARAMS, "all")
    assert found.items.tolist() == [list(range(20))] * 2
    found = predict(Scored([0.0] * 10 + [1.0] * 5 + [0.0] * 15), leave_one_out([[1, 2, 3]]), "test", PARAMS, "all")
    assert found.items[0].tolist() == [*range(10, 15), *range(10), *range(15, 20)]


def test_scores_that_are_nan_are_refused():
    with refused(TrainingError, "Scored", names=[2], fix=["--lr", "metrics.jsonl"]):
        predict(Scored([0.0] * 20 + [float("nan")] * 10), leave_one_out([[1, 2, 3], [4, 5, 29]]), "test", PARAMS, "all")


def test_the_fix_without_gradients_names_the_model():
    with refused(TrainingError, "Counted", fix=["Counted"]):
        predict(Counted([float("nan")] * 30), leave_one_out([[1, 2, 3]]), "test", PARAMS, "all")


@pytest.mark.parametrize(("scores", "items", "warned"), [
    ([[2.0, 2.0], [3.0, 3.0]], [[0, 1], [1, 0]], True), ([[2.0, 2.0], [3.0, 2.5]], [[0, 1], [1, 0]], False),
    ([[2.0, -np.inf], [3.0, -np.inf]], [[0, -1], [1, -1]], False),
    ([[2.0, 2.0, -np.inf], [3.0, -np.inf, -np.inf]], [[0, 1, -1], [1, -1, -1]], True), ([[]], [[]], False)])
def test_equal_scores_in_all_lists_are_reported(scores, items, warned):
    lists = np.array(items, dtype=np.int64), np.array(scores)
    assert bool(cannot_rank(Scored([0.0]), *lists)) == warned
    assert cannot_rank(Counted([0.0]), *lists) == ""


REPEATS, NO_REPEATS = [[0, 1, 0, 2, 3], [4, 5, 6]], [[0, 1, 2, 0, 1], [0, 1, 2], [3, 3]]


@pytest.mark.parametrize(("histories", "protocol"), [
    (REPEATS, "all"), (NO_REPEATS[:2], "unseen"), (NO_REPEATS, "all"), ([[1, 2, 2, 2], [3, 3, 3]], "unseen"),
    ([[0, 1], [1, 0]], "unseen")])
def test_only_repeats_in_training_events_make_auto_select_by_all_items(histories, protocol):
    sequences = leave_one_out(histories)
    assert selecting_protocol(sequences, {"filter_seen": "auto"}) == protocol
    assert selecting_protocol(sequences, {"filter_seen": True}) == "unseen"
    assert selecting_protocol(sequences, {"filter_seen": False}) == "all"


def test_repeats_of_a_large_dataset_are_found():
    users, items = np.array([2**21 - 1, 2**21, 2**21]), np.array([2**20, 5, 2**20])
    sequences = Sequences(np.r_[items, items], np.r_[users, users + 2], np.zeros(6, dtype=np.int8))
    assert not sequences.has_repeats
    users[1], items[1] = users[0], items[0]
    assert Sequences(items, users, np.zeros(3, dtype=np.int8)).has_repeats


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
def test_unseen_items_have_the_same_scores_in_both_protocols(make_model, sequences, name, normalize_over):
    model = make_model(name, normalize_over=normalize_over, num_beams=NUM_ITEMS)
    model.fit(sequences.training_sequences(), sequences.validation_events())
    params = {"max_history": 4, "top_k": NUM_ITEMS, "eval_batch_size": 7}
    found = {of: predict(model.eval(), sequences, "test", params, of) for of in ("all", "unseen")}
    assert (found["all"].items >= 0).all()
    num_seen = 0
    for row, position in enumerate(found["all"].positions):
        seen = {*sequences.item[sequences.first[position]:position].tolist()}
        score_of = {of: dict(zip(lists.items[row].tolist(), lists.scores[row].tolist(), strict=True))
                    for of, lists in found.items()}
        score_of["unseen"].pop(-1, None)  # the empty positions
        assert score_of["unseen"].keys() == score_of["all"].keys() - seen
        assert score_of["unseen"] == pytest.approx({item: score_of["all"][item] for item in score_of["unseen"]},
                                                   abs=1e-5)
        num_seen += len(seen)
    assert num_seen


def test_evaluation_has_code_hits_only_if_items_share_an_id(successor):
    sequences = leave_one_out([[0, 1, 2, 3], [0, 4, 2, 9]])
    params = {"max_history": 3, "top_k": 20, "eval_batch_size": 3}
    assert "code_recall@10" not in evaluate(successor, sequences, "test", params, "all")[1]
    # After item 2, the model recommends 3, 4, ..., 12. Item 9 shares its ID with item 4, so both targets are hits.
    group_of = np.arange(30)
    group_of[9] = 4
    successor.catalogue = Catalogue(30, None, [], group_of=group_of)
    _, values = evaluate(successor, sequences, "test", params, "all")
    assert values["code_ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert values["ndcg@10"] == pytest.approx((1 + 1 / math.log2(8)) / 2)


def test_only_the_chosen_events_are_predicted(successor):
    sequences = leave_one_out([[0, 1, 2, 3], [5, 6, 7, 8], [9, 10, 11, 12]])
    params = {"max_history": 3, "top_k": 20, "eval_batch_size": 3}
    chosen = sequences.positions("valid")[[0, 2]]
    found = predict(successor, sequences, "valid", params, "all", positions=chosen)
    assert found.positions.tolist() == [2, 10]
    assert found.targets.tolist() == [2, 11]
    assert found.ranks().tolist() == [1, 1]


def test_ranks_by_hand():
    found = predictions([[6, 5, 0], [6, 5, 1], [3, -1, -1]], [0, 2, 3])
    assert found.ranks().tolist() == [3, 0, 1]
