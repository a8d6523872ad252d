"""A prior by hand: its scores, the choice of its weight, and a run with a prior."""

import json
import math

import numpy as np
import pytest
import torch

from common.errors import ArtifactError, DataError
from recommendation import prior_weight
from recommendation.dataset import Sequences
from recommendation.evaluator import metrics, predict
from recommendation.inputs import Choice
from recommendation.metrics import PROTOCOLS
from recommendation.models.abstract_model import AbstractRecommender, Catalogue
from recommendation.models.sasrec.model import SASRec
from recommendation.models.with_prior import WithPrior
from recommendation.pipeline import Pipeline
from recommendation.prior_weight import MAX_EVENTS, WEIGHTS, choose_weights, largest_good_weight
from recommendation.recommender import Recommender
from recommendation.runs import load_recommender, read_run
from tests.errors import refused

from .conftest import NUM_ITEMS, leave_one_out, padded, windows_of
from .test_pipeline import HISTORIES, RAW_ITEMS, write_data


class Fixed(AbstractRecommender):
    """The same log-probabilities after every history."""

    needs_codes = False

    def __init__(self, log_p: list[float]):
        super().__init__({}, Catalogue(len(log_p), None, []))
        self.log_p = torch.tensor(log_p).double()

    def score_items(self, histories):
        return self.log_p.expand(len(histories.items), -1)


class Successor(AbstractRecommender):
    """A prior: the item after the last one has the probability 1/2, and all other items share the rest.

    If the items of the history are excluded, this is the item before the last one.
    """

    needs_codes = False

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        self.register_buffer("num_events", torch.zeros((), dtype=torch.int64))

    def fit(self, sequences, validation):
        self.num_events += len(sequences[0])
        return True

    def score_items(self, histories):
        return self.log_probabilities(histories, False)

    def log_probabilities(self, histories, unseen):
        n = self.catalogue.num_items
        last = histories.items.gather(1, histories.lengths.unsqueeze(1) - 1)
        scores = torch.full((len(last), n), 0.5 / (n - 1))
        return scores.scatter(1, (last + (-1 if unseen else 1)) % n, 0.5).log()


def fixed_prior(histories, unseen):
    """Three items: .1, .2, .7 or, without the items of the history, .25, .5, .25."""
    row = [0.25, 0.5, 0.25] if unseen else [0.1, 0.2, 0.7]
    return torch.tensor([row] * len(histories.items)).double().log()


@pytest.fixture
def with_prior():
    """p(item) is .6, .3 and .1; the weights of the prior are 1 and 2."""
    return WithPrior(Fixed(np.log([0.6, 0.3, 0.1]).tolist()), fixed_prior, {"all": 1.0, "unseen": 2.0})


def test_the_weighted_prior_is_added_by_hand(with_prior):
    histories = windows_of([0], [1])
    assert torch.allclose(with_prior.score_items(histories).exp(),
                          torch.tensor([[0.6 * 0.1, 0.3 * 0.2, 0.1 * 0.7]] * 2).double())
    items, scores = with_prior.recommend(histories, 3)
    assert items[:, 0].tolist() == [2, 2]
    assert torch.allclose(scores[:, 0].exp(), torch.tensor([0.07, 0.07]).double())
    items, scores = with_prior.recommend_unseen(histories, padded([0], []), 3)
    # .3 * .5^2 = .075, .1 * .25^2 = .00625; with item 0: .6 * .25^2 = .0375
    assert items.tolist() == [[1, 2, -1], [1, 0, 2]]
    assert torch.allclose(scores[1].exp(), torch.tensor([0.075, 0.0375, 0.00625]).double())


def test_preparing_a_model_with_a_prior_prepares_the_model(with_prior, monkeypatch):
    calls = []
    monkeypatch.setattr(Fixed, "prepare", lambda model: calls.append(model))
    with_prior.prepare()
    assert calls == [with_prior.model]
    assert with_prior.trained_by_gradient()


PARAMS = {"max_history": 5, "top_k": 20, "eval_batch_size": 16, "select_by": "ndcg@10", "select_mode": "max"}
# The model prefers item 7, and then the smaller items. In the validation, users go on with the next item in half of the
# cases, and with item 7 in the others. In the test, nobody goes on with the next item.
NEXT = [[20, 3, 4, 9], [21, 10, 11, 9], [22, 15, 7, 9], [23, 18, 7, 9], [24, 2, 3, 9]]
MODEL = Fixed([-0.1 * item for item in range(7)] + [2.0] + [-0.1 * item for item in range(8, 30)])


def choose(histories: list[list[int]], **own) -> WithPrior:
    prior = Successor({}, MODEL.catalogue)
    return choose_weights(MODEL, prior.log_probabilities, leave_one_out(histories), PARAMS | own)


def values_of(histories: list[list[int]], protocol: str, name: str) -> dict[float, float]:
    """Each weight, and the validation metric with this weight."""
    prior, sequences = Successor({}, MODEL.catalogue), leave_one_out(histories)
    return {weight: metrics(predict(WithPrior(MODEL, prior.log_probabilities, {protocol: weight}), sequences, "valid",
                                    PARAMS, protocol), 30)[name] for weight in WEIGHTS}


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_metric_of_all_lists_has_no_error_so_the_best_weight_is_chosen(mode):
    found = choose(NEXT, select_by="coverage@5", select_mode=mode).weights
    for protocol in ("all", "unseen"):
        values = values_of(NEXT, protocol, "coverage@5")
        best = (max if mode == "max" else min)(values.values())
        assert found[protocol] == max(weight for weight in WEIGHTS if values[weight] == best)


def test_the_largest_weight_within_one_standard_error_by_hand():
    # 100 events. The second weight gains on 10 events and the third loses on 10 others, each by 1.
    first, second, third = np.zeros(100), np.zeros(100), np.zeros(100)
    second[:10], third[10:20] = 1, -1
    # To the best weight 1: weight 2 loses 20 times, -.2 ± .04; weight 4 loses 10 times and gains 9 times, -.01 ± .04.
    assert largest_good_weight({0.0: first, 1.0: second, 2.0: third}) == 1.0
    fourth = np.zeros(100)
    fourth[20:29] = 1
    assert largest_good_weight({0.0: first, 1.0: second, 2.0: third, 4.0: fourth}) == 4.0
    # 10 losses of 100 are -.1, and their standard error is .03.
    assert largest_good_weight({0.0: first, 1.0: third}) == 0.0
    assert largest_good_weight({0.0: first[:1], 1.0: first[:1] - 1e-9}) == 0.0  # one value has no error


def test_weights_by_hand():
    # With all items, a large weight puts the next item first. If the items of the history are excluded, the prior
    # prefers the wrong item. Users with the same history have the same metric, so its standard error is zero.
    same = [[24, 14, 15, 9]] * 3
    assert choose(same).weights["all"] == 8.0
    values = values_of(same, "all", "ndcg@10")
    # The target becomes the first item if 3.4 * weight outweighs 2 + .1 * 15, because log(.5 / (.5 / 29)) = 3.4.
    assert values[0.8] < values[1.6] == values[8.0] == 1.0
    # The prior puts item 9 before the target 3 if 3.4 * weight outweighs .1 * 6.
    assert choose([[24, 10, 3, 9]] * 3).weights["unseen"] == 0.1
    # Item 7 is the target. The next item comes before it if 3.4 * weight outweighs 2 + .1 * 4.
    assert choose([[20, 3, 7, 9], [21, 10, 7, 9]]).weights == {"all": 0.4, "unseen": 0.4}


def test_test_events_have_no_influence_on_the_weights():
    others = [[*history[:-1], (history[-2] + 1) % 30] for history in NEXT]
    assert choose(others).weights == choose(NEXT).weights


def test_at_most_2000_validation_events_choose_the_weight(monkeypatch):
    asked: list[np.ndarray] = []
    found = predict(MODEL, leave_one_out(NEXT), "valid", PARAMS, "all")

    def record(*args, positions):
        assert args[2] == "valid"
        asked.append(positions)
        return found

    monkeypatch.setattr(prior_weight, "predict", record)
    user = np.arange(MAX_EVENTS + 1).repeat(3)
    split = np.tile(np.array([0, 1, 2], dtype=np.int8), MAX_EVENTS + 1)
    prior = Successor({}, MODEL.catalogue)
    for num_users in (MAX_EVENTS + 1, MAX_EVENTS):
        asked.clear()
        part = user < num_users
        sequences = Sequences(np.zeros(part.sum(), dtype=np.int64), user[part], split[part])
        choose_weights(MODEL, prior.log_probabilities, sequences, PARAMS)
        events, num_times = np.unique(np.concatenate(asked), return_counts=True)
        assert len(events) == MAX_EVENTS
        assert set(num_times) == {2 * len(WEIGHTS)}  # every weight is compared on the same events
        assert set(split[events]) == {1}


def test_the_prior_of_an_event_is_computed_once_for_all_weights():
    sequences, prior, num_rows = leave_one_out(NEXT), Successor({}, MODEL.catalogue), []

    def counted(histories, unseen):
        num_rows.append(len(histories.items))
        return prior.log_probabilities(histories, unseen)

    choose_weights(MODEL, counted, sequences, PARAMS | {"eval_batch_size": 2})
    assert sum(num_rows) == len(PROTOCOLS) * len(sequences.positions("valid"))
    assert max(num_rows) <= 2


@pytest.fixture
def run_with_prior(tmp_path, make_config, monkeypatch):
    """A finished run of sasrec whose prior is `Successor`, with the name of another baseline: (folder, run)."""
    monkeypatch.setattr("recommendation.pipeline.code_of", lambda name, prior, teacher: "code")
    monkeypatch.setattr("recommendation.runs.code_of", lambda name, prior, teacher: "code")
    for stage in ("pipeline", "runs"):
        monkeypatch.setattr(f"recommendation.{stage}.make_baseline", lambda name, catalogue: Successor({}, catalogue))
    folder = write_data(tmp_path, HISTORIES)
    pipeline = Pipeline(make_config("sasrec", top_k=20, prior="transitions"), folder, Choice("sasrec"),
                        tmp_path / "runs", "train")
    pipeline.execute(force=False)
    return folder, pipeline.run.folder


@pytest.mark.slow
def test_a_run_with_a_prior_reports_the_model_the_prior_and_both(run_with_prior):
    folder, run = run_with_prior
    content = json.loads((run / "metrics.json").read_text())
    ranks = json.loads((run / "ranks.json").read_text())
    assert [name for name in content if name in ("alone", "prior", "both")] == [*ranks] == ["alone", "prior", "both"]
    assert content["weights"].keys() == {"all", "unseen"}
    assert set(content["weights"].values()) <= {*WEIGHTS}
    assert read_run(run).rankers == ["alone", "prior", "both"]
    sequences, params = Sequences.load(folder, "cpu"), read_run(run).config["sasrec"]["training_params"]
    loaded = load_recommender(folder, run.parents[4], Choice("sasrec"))
    assert loaded.ranker.weights == content["weights"]
    prior = Successor({}, loaded.model.catalogue)
    both = WithPrior(loaded.model, prior.log_probabilities, content["weights"])
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for protocol, key in (("all", "items"), ("unseen", "unseen")):
        for name, ranker in (("alone", loaded.model), ("prior", prior), ("both", both), ("both", loaded.ranker)):
            found = predict(ranker, sequences, "test", params, protocol)
            assert found.ranks().tolist() == ranks[name][protocol]
            assert metrics(found, NUM_ITEMS)["ndcg@10"] == pytest.approx(content[name]["test"][protocol]["ndcg@10"])
        assert [[RAW_ITEMS[item] for item in row] for row in found.items] == [line[key] for line in lines]


@pytest.mark.slow
def test_a_model_that_ranks_nothing_is_named_although_the_prior_ranks(tmp_path, make_config, monkeypatch, caplog):
    monkeypatch.setattr(SASRec, "score_items", lambda model, histories: torch.zeros(len(histories.items), NUM_ITEMS))
    folder = write_data(tmp_path, HISTORIES)
    config = make_config("sasrec", top_k=20, prior="transitions", max_steps=1)
    Pipeline(config, folder, Choice("sasrec"), tmp_path / "runs", "train").execute(force=False)
    assert "SASRec gives the same score to all items" in caplog.text


@pytest.mark.slow
def test_users_of_a_run_with_a_prior_get_both(run_with_prior):
    folder, run = run_with_prior
    recommender = Recommender.load(folder.name, model="sasrec", data_root=folder.data_root, run_root=run.parents[4])
    content = json.loads((run / "metrics.json").read_text())
    for filter_seen, protocol in ((False, "all"), (True, "unseen"), (None, "unseen")):
        assert recommender.evaluate(filter_seen=filter_seen) == content["both"]["test"][protocol]
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for history, line in zip(HISTORIES[:3], lines, strict=False):
        for filter_seen, key in ((False, "items"), (True, "unseen")):
            [items] = recommender.recommend([[RAW_ITEMS[item] for item in history[:-1]]], 20, filter_seen)
            assert [item.raw_id for item in items] == line[key]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{"all": 1.0}, {"all": 1.0, "unseen": math.inf}, {"all": 1.0, "unseen": 1e308},
                                     None])
def test_damaged_weights_are_refused(run_with_prior, weights):
    folder, run = run_with_prior
    content = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(content | {"weights": weights}))
    with refused(ArtifactError, run / "metrics.json", names=["weights"], fix=["train --force"]):
        load_recommender(folder, run.parents[4], Choice("sasrec"))


@pytest.mark.slow
def test_metrics_that_do_not_fit_the_prior_are_refused(run_with_prior):
    folder, run = run_with_prior
    content = json.loads((run / "metrics.json").read_text())
    del content["both"]
    (run / "metrics.json").write_text(json.dumps(content))
    with refused(ArtifactError, run / "metrics.json", names=["transitions"], fix=["train --force"]):
        load_recommender(folder, run.parents[4], Choice("sasrec"))


@pytest.mark.slow
def test_a_prior_that_cannot_be_fitted_stops_before_the_training(tmp_path, make_config, monkeypatch):
    def fail(*args):
        raise DataError("interactions.parquet", "has too many pairs")

    monkeypatch.setattr("recommendation.models.counting_model.largest_distance", fail)
    monkeypatch.setattr("recommendation.pipeline.train", lambda *args: pytest.fail("the training has begun"))
    folder = write_data(tmp_path, HISTORIES)
    with refused(DataError, "interactions.parquet"):
        Pipeline(make_config("sasrec", prior="transitions"), folder, Choice("sasrec"), tmp_path / "runs",
                 "train").execute(force=False)


@pytest.mark.slow
def test_a_damaged_prior_is_refused(run_with_prior):
    folder, run = run_with_prior
    [path] = [path for path in (run / "checkpoints").glob("*.safetensors") if "transitions" in path.name]
    path.write_bytes(path.read_bytes()[:-1])
    with refused(ArtifactError, path):
        load_recommender(folder, run.parents[4], Choice("sasrec"))
