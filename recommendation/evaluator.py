"""Ranking metrics in item ids over the whole catalogue."""

from typing import NamedTuple

import numpy as np

from common.errors import TrainingError
from common.progress import Progress
from recommendation.dataset import Sequences
from recommendation.models.abstract_model import AbstractRecommender
from recommendation.ranking import rank_windows

# B targets, N items, k results

CUTOFFS = (1, 5, 10, 20)
BUCKETS = ("cold", "tail", "middle", "head")


class Predictions(NamedTuple):
    """What a model recommends before each event of a split."""

    positions: np.ndarray  # (B,) the events, as indices into all events
    targets: np.ndarray    # (B,) their items
    items: np.ndarray      # (B, k) recommended, best first; -1 where there is none
    scores: np.ndarray     # (B, k)


def predict(model: AbstractRecommender, sequences: Sequences, split: str, params: dict,
            progress: Progress | None = None) -> Predictions:
    """Ask the model about every event of a split.

    With `filter_seen` the items of the whole history, however long, are left out of every list. Raises
    TrainingError if a score is not a number.
    """
    positions = sequences.positions(split)
    items, scores = rank_windows(model, sequences, sequences.first[positions], positions, params["top_k"],
                                 model.catalogue.num_items, params, params["filter_seen"], progress)
    if np.isnan(scores).any():
        num_bad = int(np.isnan(scores).any(axis=1).sum())
        raise TrainingError(type(model).__name__, f"the scores of {num_bad} of {len(scores)} histories are not numbers",
                            fix="a lower --lr; the run's metrics.jsonl has its losses" if model.trained_by_gradient()
                            else f"correct the scores in {type(model).__name__}.recommend, which no --lr changes")
    return Predictions(positions, sequences.item[positions], items, scores)


def metrics(predictions: Predictions, num_items: int) -> dict:
    """Recall, NDCG and MRR at `CUTOFFS` with their standard errors, coverage, and what is wrong with lists.

    Each event has one relevant item, so recall equals the hit rate, NDCG is 1 / log2(1 + rank) and MRR is 1 / rank.
    `coverage@k` is the share of the catalogue that stands in somebody's first k. Of all places in the lists,
    `missing_share` have no item, `duplicate_share` one that stands there already, `invalid_share` one that is
    not in the catalogue.
    """
    rank = ranks(predictions)
    figures: dict = {"num_targets": len(rank)}
    for cutoff in CUTOFFS:
        for name, value in _at(rank, cutoff).items():
            figures[f"{name}@{cutoff}"] = float(value.mean())
            figures[f"{name}@{cutoff}_stderr"] = float(value.std() / np.sqrt(len(value)))
    for cutoff in CUTOFFS:
        listed = np.unique(predictions.items[:, :cutoff])
        figures[f"coverage@{cutoff}"] = int((listed >= 0).sum()) / num_items
    listed = np.sort(predictions.items, axis=1)
    repeated = (listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)
    figures["missing_share"] = float((predictions.items == -1).mean())
    figures["invalid_share"] = float(((predictions.items < -1) | (predictions.items >= num_items)).mean())
    figures["duplicate_share"] = float(repeated.sum() / predictions.items.size)
    return figures


def ranks(predictions: Predictions) -> np.ndarray:
    """(B,) the target's place in its list, 1 for the best; infinity where it is not listed."""
    hit = predictions.items == predictions.targets[:, None]                       # (B, k)
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, np.inf)


def _at(rank: np.ndarray, cutoff: int) -> dict[str, np.ndarray]:
    """Each metric's value of every target."""
    found = rank <= cutoff
    return {"recall": found.astype(float), "ndcg": np.where(found, 1 / np.log2(1 + rank), 0.0),
            "mrr": np.where(found, 1 / rank, 0.0)}


def by_popularity(predictions: Predictions, counts: np.ndarray) -> dict[str, dict]:
    """Recall@10 and NDCG@10 of targets of like popularity; `counts` (N,) training events of each item.

    `cold` items have none. The others are parted, the least popular first, such that the items of `tail`,
    `middle` and `head` have about a third of the training events each.
    """
    bucket_of = np.zeros(len(counts), dtype=int)
    order = np.argsort(counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    bucket_of[order] = 1 + np.minimum(3 * before // max(counts.sum(), 1), 2)
    bucket_of[counts == 0] = 0
    values, bucket = _at(ranks(predictions), 10), bucket_of[predictions.targets]
    figures = {}
    for number, name in enumerate(BUCKETS):
        inside = bucket == number
        figures[name] = {"num_items": int((bucket_of == number).sum()), "num_targets": int(inside.sum()),
                         **{f"{key}@10": float(values[key][inside].mean()) if inside.any() else None
                            for key in ("recall", "ndcg")}}
    return figures
