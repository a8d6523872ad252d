"""The evaluation: the best items for any histories, and metrics in item ids over the whole catalogue."""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from common.distributed import all_gather_rows, world_size
from common.distributed import rank as process_number
from common.errors import TrainingError
from common.progress import Progress
from recommendation.dataset import Sequences, Spans
from recommendation.decoding.top_k import PADDING, top_items
from recommendation.histories import Histories
from recommendation.metrics import RankedLists, measure, ndcg, recall
from recommendation.models.abstract_model import AbstractRecommender

# H histories, B targets or batch, N items, k results, S most seen items of a history

USUAL_LENGTH = 64  # of a list; longer ones get smaller batches, as a search grows with both
BUCKETS = ("cold", "tail", "middle", "head")


class Predictions(NamedTuple):
    """What a model recommends before each event of a split."""

    positions: np.ndarray  # (B,) the events, as indices into all events
    targets: np.ndarray    # (B,) their items
    items: np.ndarray      # (B, k) recommended, best first; -1 where there is none
    scores: np.ndarray     # (B, k)


def predict(model: AbstractRecommender, sequences: Sequences, split: str, params: dict, title: str = "") -> Predictions:
    """Ask the model about every event of a split, and show the progress under a title if there is one.

    With `filter_seen` the items of the whole history, however long, are left out of every list. Raises
    TrainingError if a score is not a number.
    """
    positions = sequences.positions(split)
    with Progress(title, len(positions), "targets", kept=split == "test") if title else nullcontext() as progress:
        items, scores = rank_windows(model, sequences, Spans(sequences.first[positions], positions), params,
                                     params["top_k"], params["filter_seen"], progress)
    if np.isnan(scores).any():
        num_bad = int(np.isnan(scores).any(axis=1).sum())
        raise TrainingError(type(model).__name__, f"the scores of {num_bad} of {len(scores)} histories are not numbers",
                            fix="a lower --lr; the run's metrics.jsonl has its losses" if model.trained_by_gradient()
                            else f"correct the scores in {type(model).__name__}.recommend, which no --lr changes")
    return Predictions(positions, sequences.item[positions], items, scores)


def metrics(predictions: Predictions, num_items: int) -> dict:
    """Every metric of metrics.py with its standard error, and what is wrong with lists.

    Each event has one relevant item. Of all places in the lists, `missing_share` have no item, `duplicate_share` one
    that stands there already, `invalid_share` one that is not in the catalogue.
    """
    lists = _ranked_lists(predictions, num_items)
    listed = np.sort(lists.items, axis=1)
    repeated = (listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)
    return {"num_targets": len(lists.ranks), **measure(lists),
            "missing_share": float((lists.items == -1).mean()),
            "invalid_share": float(((lists.items < -1) | (lists.items >= num_items)).mean()),
            "duplicate_share": float(repeated.sum() / lists.items.size)}


def _ranked_lists(predictions: Predictions, num_items: int) -> RankedLists:
    hit = predictions.items == predictions.targets[:, None]                       # (B, k)
    return RankedLists(np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, np.inf), predictions.items, num_items)


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
    lists, bucket = _ranked_lists(predictions, len(counts)), bucket_of[predictions.targets]
    values = {"recall": recall(lists, 10), "ndcg": ndcg(lists, 10)}
    buckets = {}
    for number, name in enumerate(BUCKETS):
        inside = bucket == number
        buckets[name] = {"num_items": int((bucket_of == number).sum()), "num_targets": int(inside.sum()),
                         **{f"{key}@10": float(value[inside].mean()) if inside.any() else None
                            for key, value in values.items()}}
    return buckets


class Ranking(NamedTuple):
    """The best items of each history, best first."""

    items: np.ndarray     # (H, k) int64; -1 where there are no more
    scores: np.ndarray    # (H, k)
    fallback: np.ndarray  # (H,) bool: nothing of the history is known, so these are the most popular items


def rank(model: AbstractRecommender, histories: Histories, popularity: np.ndarray, params: dict, top_k: int,
         filter_seen: bool = False, device: torch.device | str = "cpu") -> Ranking:
    """At most `top_k` items a history, without those in it if `filter_seen`.

    popularity (N,): the training events of each item, what an empty history is answered by, and its scores.
    """
    num_items, lengths = len(popularity), histories.lengths
    width = min(top_k, num_items)
    best = top_items(torch.from_numpy(popularity).double().unsqueeze(0), width)
    items, scores = (part.numpy().repeat(len(lengths), axis=0) for part in best)
    row = np.repeat(np.arange(len(lengths)), lengths)
    sequences = Sequences(histories.items, row, np.zeros(len(row), dtype=np.int8), device)
    asked = np.flatnonzero(lengths)
    shown = Progress("recommend", len(asked), "histories") if len(asked) > params["eval_batch_size"] else nullcontext()
    with shown as progress:
        items[asked], scores[asked] = rank_windows(
            model, sequences, Spans(histories.offsets[:-1][asked], histories.offsets[1:][asked]), params, width,
            filter_seen, progress)
    return Ranking(items, scores, lengths == 0)


@torch.no_grad()
def rank_windows(model: AbstractRecommender, sequences: Sequences, histories: Spans, params: dict, top_k: int,
                 filter_seen: bool, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
    """(H, k) items and scores behind each history, which is a span of events; -1 and -inf for none.

    The newest `max_history` of them are read, all of them are left out if `filter_seen`. Batches hold like
    lengths, so that little padding is computed; of several processes each asks about every so many of them. What
    a history gets does not depend on the others.
    """
    (starts, ends), num_items = histories, model.catalogue.num_items
    items = np.zeros((len(starts), top_k), dtype=np.int64)
    scores = np.zeros(items.shape)
    seen = _seen(sequences.item, starts, ends, num_items) if filter_seen else None
    read_from = np.maximum(starts, ends - params["max_history"])
    size = max(params["eval_batch_size"] * USUAL_LENGTH // max(USUAL_LENGTH, top_k), 1)
    by_length = np.argsort(read_from - ends, kind="stable")
    batches = [by_length[start:start + size] for start in range(0, len(by_length), size)]
    for batch in batches[process_number()::world_size()]:
        windows = sequences.windows(read_from[batch], ends[batch])
        if seen is None:
            result = model.recommend(windows, top_k)
        else:
            result = model.recommend_unseen(windows, _seen_by(batch, seen, num_items).to(windows.items.device), top_k)
        items[batch], scores[batch] = result.items.cpu().numpy(), result.scores.cpu().numpy()
        if progress is not None:
            progress.update(len(batch) * world_size())
    all_gather_rows(items, scores)
    return items, scores


def _seen(item: np.ndarray, starts: np.ndarray, ends: np.ndarray, num_items: int) -> np.ndarray:
    """Ordered `row * N + item`, once for each item of each window."""
    lengths = ends - starts
    row = np.repeat(np.arange(len(starts)), lengths)
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.unique(row * num_items + item[starts[row] + within])


def _seen_by(batch: np.ndarray, seen: np.ndarray, num_items: int) -> torch.Tensor:
    """What each history of a batch has seen, (B, S), PADDING behind; `seen` as `_seen` returns it."""
    begin, end = (np.searchsorted(seen, (batch + step) * num_items)[:, None] for step in (0, 1))
    place = begin + np.arange((end - begin).max())
    return torch.from_numpy(np.where(place < end, seen[np.minimum(place, len(seen) - 1)] % num_items, PADDING))
