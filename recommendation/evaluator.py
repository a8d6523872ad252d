"""Ranking metrics in item ids over the whole catalogue."""

from typing import NamedTuple

import numpy as np
import torch

from common.distributed import fill_in, rank, world_size
from common.progress import Progress
from recommendation.dataset import Sequences
from recommendation.models.abstract_model import AbstractRecommender

# B targets, k results

CUTOFFS = (5, 10, 20)


class Predictions(NamedTuple):
    """What a model recommends before each event of a split."""

    positions: np.ndarray  # (B,) the events, as indices into all events
    targets: np.ndarray    # (B,) their items
    items: np.ndarray      # (B, k) recommended, best first; -1 where there is none
    scores: np.ndarray     # (B, k)


@torch.no_grad()
def predict(model: AbstractRecommender, sequences: Sequences, split: str, params: dict,
            progress: Progress | None = None) -> Predictions:
    """Ask the model about every event of a split; like lengths together, so that little padding is computed.

    Of several processes each asks about every so many batches, the same ones that a single process makes.
    """
    positions = sequences.positions(split)
    length = np.minimum(positions - sequences.first[positions], params["max_history"])
    order = np.argsort(-length, kind="stable")
    items = np.zeros((len(positions), params["top_k"]), dtype=np.int64)
    scores = np.zeros(items.shape, dtype=np.float32)
    size = params["eval_batch_size"]
    for start in range(rank() * size, len(order), world_size() * size):
        rows = order[start:start + size]
        result = model.recommend(sequences.histories(positions[rows], params["max_history"]), params["top_k"])
        items[rows], scores[rows] = result.items.cpu().numpy(), result.scores.cpu().numpy()
        if progress is not None:
            progress.update(len(order[start:start + world_size() * size]))
    fill_in(items, scores)
    return Predictions(positions, sequences.item[positions], items, scores)


def metrics(predictions: Predictions) -> dict:
    """Recall and NDCG at `CUTOFFS`, their standard errors, and the share of invalid and duplicate results.

    Each event has one relevant item, so recall is the hit rate and NDCG is 1 / log2(1 + rank).
    """
    hit = predictions.items == predictions.targets[:, None]                       # (B, k)
    rank = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, np.inf)              # (B,), 1 is the best
    figures: dict = {"num_targets": len(rank)}
    for cutoff in CUTOFFS:
        found = rank <= cutoff
        for name, value in (("recall", found.astype(float)), ("ndcg", np.where(found, 1 / np.log2(1 + rank), 0.0))):
            figures[f"{name}@{cutoff}"] = float(value.mean())
            figures[f"{name}@{cutoff}_stderr"] = float(value.std() / np.sqrt(len(value)))
    listed = np.sort(predictions.items, axis=1)
    repeated = (listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)
    figures["invalid_share"] = float((predictions.items < 0).mean())
    figures["duplicate_share"] = float(repeated.sum() / predictions.items.size)
    return figures
