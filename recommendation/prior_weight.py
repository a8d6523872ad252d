"""The choice of the weight of a prior, after the training."""

import logging

import numpy as np

from recommendation.dataset import Sequences
from recommendation.evaluator import metrics, predict
from recommendation.metrics import PROTOCOLS
from recommendation.models.abstract_model import AbstractRecommender
from recommendation.models.with_prior import LogProbabilities, WithPrior

log = logging.getLogger(__name__)

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 4.0, 8.0)
MAX_EVENTS = 2000  # validation events that choose the weight


def choose_weights(model: AbstractRecommender, log_probabilities: LogProbabilities, sequences: Sequences,
                   params: dict) -> WithPrior:
    """Return the model with a prior, with the weight that is best on validation events, one for each protocol."""
    positions = sequences.positions("valid")
    if len(positions) > MAX_EVENTS:
        positions = np.sort(np.random.default_rng(0).choice(positions, MAX_EVENTS, replace=False))
    name, sign = params["select_by"], -1 if params["select_mode"] == "min" else 1
    chosen = {}
    for protocol in PROTOCOLS:
        values = {}
        for weight in WEIGHTS:
            ranker = WithPrior(model, log_probabilities, dict.fromkeys(PROTOCOLS, weight))
            found = predict(ranker, sequences, "valid", params, protocol, positions=positions)
            values[weight] = metrics(found, model.catalogue.num_items)[name]
        chosen[protocol] = max(values, key=lambda weight: sign * values[weight])  # noqa: B023 (used at once)
        log.info("prior, %s items: weight %g; validation %s: %s", protocol, chosen[protocol], name,
                 ", ".join(f"{weight:g}: {value:.4f}" for weight, value in values.items()))
    return WithPrior(model, log_probabilities, chosen)
