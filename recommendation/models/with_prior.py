"""A trained recommender whose scores are added to the log-probabilities of a baseline."""

from collections.abc import Callable

import torch
from torch import Tensor

from recommendation.decoding.top_k import Prior

from .abstract_model import AbstractRecommender, Recommendations, Windows

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 4.0, 8.0)  # the weights of a prior that are compared

LogProbabilities = Callable[[Windows, bool], Tensor]
"""A function of the histories that returns the log-probability of every item, (B, N). The second argument is whether
to use the settings for unseen items. The items of the history keep their probability."""


class WithPrior(AbstractRecommender):
    """A recommender with the scores log p(model) + weight * log p(prior).

    The prior has no part in the training. It is exact for rare items. The model generalizes to other items.
    """

    def __init__(self, model: AbstractRecommender, log_probabilities: LogProbabilities, weights: dict[str, float]):
        """weights: the weight of the prior for each protocol, `all` and `unseen`"""
        super().__init__({}, model.catalogue)
        self.model, self.log_probabilities, self.weights = model, log_probabilities, weights

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        return self.model.recommend_with_prior(histories, self._prior(histories, False), None, top_k)

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        return self.model.recommend_with_prior(histories, self._prior(histories, True), seen, top_k)

    def score_items(self, histories: Windows) -> Tensor:
        return self.model.score_items(histories) + self._prior(histories, False).added()

    def prepare(self) -> None:
        self.model.prepare()

    def _prior(self, histories: Windows, unseen: bool) -> Prior:
        log_probabilities = self.log_probabilities(histories, unseen)
        weight = torch.full((len(log_probabilities), 1), self.weights["unseen" if unseen else "all"])
        return Prior(log_probabilities, weight.to(log_probabilities))
