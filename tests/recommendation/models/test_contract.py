"""The check of a recommender before it is trained."""

import pytest
import torch

from common.errors import ConfigError
from recommendation.models import find_class
from recommendation.models.abstract_model import AbstractRecommender, Catalogue, Recommendations, top_items
from recommendation.models.contract import check_contract
from tests.errors import refused

from ..conftest import LOSSES, NUM_ITEMS, windows_of

HISTORIES = windows_of([3, 8, 3, 29, 11], [0], [5, 21])
TOP_K = 20


class Kept(AbstractRecommender):
    """Keeps the contract: the same scores after every history; later items score higher."""

    def __init__(self):
        super().__init__({}, Catalogue(NUM_ITEMS, None, []))
        self.layer, self.frozen = torch.nn.Linear(1, 1), torch.nn.Dropout().eval()

    def recommend(self, histories, top_k):
        return top_items(torch.arange(NUM_ITEMS).double().repeat(len(histories.items), 1), top_k)

    def compute_loss(self, windows):
        return {"loss_total": self.layer(torch.ones(1)).sum()}


class NoRecommendations(Kept):
    def recommend(self, histories, top_k):
        return tuple(super().recommend(histories, top_k))


class OneListForAll(Kept):
    def recommend(self, histories, top_k):
        return Recommendations(*(part[:1] for part in super().recommend(histories, top_k)))


class TooLong(Kept):
    def recommend(self, histories, top_k):
        return super().recommend(histories, top_k + 1)


class Unknown(Kept):
    def recommend(self, histories, top_k):
        items, scores = super().recommend(histories, top_k)
        return Recommendations(items + 1, scores)


class Fractions(Kept):
    def recommend(self, histories, top_k):
        items, scores = super().recommend(histories, top_k)
        return Recommendations(items.double(), scores)


class Twice(Kept):
    def recommend(self, histories, top_k):
        items, scores = super().recommend(histories, top_k)
        return Recommendations(items.index_fill(1, torch.tensor([1, 4]), 7), scores)


class GapInFront(Kept):
    def recommend(self, histories, top_k):
        items, scores = super().recommend(histories, top_k)
        return Recommendations(items.index_fill(1, torch.tensor([2]), -1), scores)


class WorstFirst(Kept):
    def recommend(self, histories, top_k):
        items, scores = super().recommend(histories, top_k)
        return Recommendations(items.flip(1), scores.flip(1))


class Noisy(Kept):
    def recommend(self, histories, top_k):
        return top_items(torch.rand(len(histories.items), NUM_ITEMS), top_k)


class Counting(Kept):
    queries = 0

    def recommend(self, histories, top_k):
        self.queries += 1
        scores = torch.arange(NUM_ITEMS).double().roll(self.queries)
        return top_items(scores.repeat(len(histories.items), 1), top_k)


class ShowsSeen(Kept):
    def recommend_unseen(self, histories, seen, top_k):
        return self.recommend(histories, top_k)


class OnlyScores(Kept):
    """Keeps the contract with `score_items` only."""

    def score_items(self, histories):
        return torch.arange(NUM_ITEMS).double().repeat(len(histories.items), 1)


class OneScore(OnlyScores):
    def score_items(self, histories):
        return super().score_items(histories)[0]


class FewScores(OnlyScores):
    def score_items(self, histories):
        return super().score_items(histories)[:, 1:]


class NoTensor(OnlyScores):
    def score_items(self, histories):
        return super().score_items(histories).tolist()


class NoisyScores(OnlyScores):
    def score_items(self, histories):
        return torch.rand(len(histories.items), NUM_ITEMS)


class Silent(AbstractRecommender):
    """Neither recommends nor scores."""

    def __init__(self):
        super().__init__({}, Catalogue(NUM_ITEMS, None, []))


class OtherName(Kept):
    def compute_loss(self, windows):
        return {"loss": self.layer(torch.ones(1)).sum()}


class LossPerRow(Kept):
    def compute_loss(self, windows):
        return {"loss_total": self.layer(torch.ones(3, 1))}


class BareLoss(Kept):
    def compute_loss(self, windows):
        return self.layer(torch.ones(1)).sum()


@pytest.mark.parametrize(("broken", "method"), [
    (NoRecommendations, "recommend"), (OneListForAll, "recommend"), (TooLong, "recommend"), (Unknown, "recommend"),
    (Fractions, "recommend"), (Twice, "recommend"), (GapInFront, "recommend"), (WorstFirst, "recommend"),
    (OneScore, "score_items"), (FewScores, "score_items"), (NoTensor, "score_items"), (Silent, "score_items"),
    (NoisyScores, "recommend"), (Noisy, "recommend"), (Counting, "recommend"), (ShowsSeen, "recommend_unseen"),
    (OtherName, "compute_loss"), (LossPerRow, "compute_loss"), (BareLoss, "compute_loss")])
def test_a_broken_contract_names_the_method(broken, method):
    with refused(ConfigError, f"{__name__}.{broken.__name__}.{method}") as raised:
        check_contract(broken(), HISTORIES, TOP_K, HISTORIES)
    assert raised.value.fix


def test_the_check_restores_modes_and_random_state():
    model, state = Kept().train(), torch.get_rng_state()
    model.frozen.eval()
    check_contract(model, HISTORIES, TOP_K, HISTORIES)
    assert (model.training, model.layer.training, model.frozen.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lists_longer_than_the_catalogue_keep_the_contract():
    for model in (Kept(), OnlyScores()):
        check_contract(model, HISTORIES, NUM_ITEMS + 5, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
def test_every_model_keeps_the_contract(make_model, sequences, name, normalize_over):
    model = make_model(name, normalize_over=normalize_over)
    fitted = model.fit(sequences.training_sequences(), sequences.validation_events())
    check_contract(model, HISTORIES, TOP_K, None if fitted else HISTORIES)


@pytest.mark.parametrize("name", ["sasrec", "popularity"])
def test_a_broken_model_is_refused_before_any_metrics(train, monkeypatch, tmp_path, name):
    model_class = find_class(name)
    recommend = model_class.recommend
    monkeypatch.setattr(model_class, "recommend", lambda *args: Recommendations(*(p[:1] for p in recommend(*args))))
    with refused(ConfigError, f"recommendation.models.{name}.model.{model_class.__name__}.recommend"):
        train(name)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert not list(tmp_path.rglob("best.safetensors"))
