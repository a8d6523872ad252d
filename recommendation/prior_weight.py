"""The choice of the weight of a prior, after the training."""

import logging

import numpy as np

from recommendation.dataset import Sequences
from recommendation.evaluator import predict, values
from recommendation.metrics import PROTOCOLS
from recommendation.models.abstract_model import AbstractRecommender
from recommendation.models.with_prior import LogProbabilities, WithPrior

# B validation events

log = logging.getLogger(__name__)

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 4.0, 8.0)
MAX_EVENTS = 2000  # validation events that choose the weight


def choose_weights(model: AbstractRecommender, log_probabilities: LogProbabilities, sequences: Sequences,
                   params: dict) -> WithPrior:
    """Return the model with a prior, with a weight that validation events choose, one for each protocol."""
    positions = sequences.positions("valid")
    if len(positions) > MAX_EVENTS:
        positions = np.sort(np.random.default_rng(0).choice(positions, MAX_EVENTS, replace=False))
    name, sign = params["select_by"], -1 if params["select_mode"] == "min" else 1
    chosen = {}
    for protocol in PROTOCOLS:
        found = {}
        for weight in WEIGHTS:
            ranker = WithPrior(model, log_probabilities, dict.fromkeys(PROTOCOLS, weight))
            predictions = predict(ranker, sequences, "valid", params, protocol, positions=positions)
            found[weight] = values(predictions, model.catalogue.num_items, name)
        chosen[protocol] = largest_good_weight({weight: sign * value for weight, value in found.items()})
        log.info("prior, %s items: weight %g; validation %s: %s", protocol, chosen[protocol], name,
                 ", ".join(f"{weight:g}: {value.mean():.4f}" for weight, value in found.items()))
    return WithPrior(model, log_probabilities, chosen)


def largest_good_weight(found: dict[float, np.ndarray]) -> float:
    """Return the largest weight that is at most one standard error worse than the best one.

    found: the values of each weight, (B,); higher is better

    The error is that of the paired difference over the events. This is the one-standard-error rule of Breiman,
    Friedman, Olshen and Stone (1984), in favor of the prior: the validation flatters the model, because its checkpoint
    was selected there, and because later events are further away from its training.
    """
    best = max(found, key=lambda weight: found[weight].mean())

    def is_good(weight: float) -> bool:
        difference = found[weight] - found[best]
        return bool(difference.mean() + difference.std() / np.sqrt(len(difference)) >= 0)

    return max(filter(is_good, found))
