"""Evaluation: rank all items of the catalogue for histories, and compute the metrics."""

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

# H histories, B targets or batch, N items, k items in a list, S largest number of seen items of a history

USUAL_LENGTH = 64  # list length; longer lists get smaller batches, because the cost of a search grows with both
BUCKETS = ("cold", "tail", "middle", "head")


class Predictions(NamedTuple):
    """The recommendations of a model for each event of a split."""

    positions: np.ndarray  # (B,) indices of the events among all events
    targets: np.ndarray    # (B,) items of the events
    items: np.ndarray      # (B, k) recommended items, best first; -1 is an empty position
    scores: np.ndarray     # (B, k)


def predict(model: AbstractRecommender, sequences: Sequences, split: str, params: dict, title: str = "") -> Predictions:
    """Recommend items for every event of a split, from the events before it. With a `title`, show the progress.

    The parameter `filter_seen` excludes the items of the whole history, also those before the newest `max_history`.
    Raises TrainingError if a score is NaN.
    """
    positions = sequences.positions(split)
    with Progress(title, len(positions), "targets", kept=split == "test") if title else nullcontext() as progress:
        items, scores = rank_windows(model, sequences, Spans(sequences.first[positions], positions), params,
                                     params["top_k"], params["filter_seen"], progress)
    if np.isnan(scores).any():
        num_bad = int(np.isnan(scores).any(axis=1).sum())
        raise TrainingError(type(model).__name__, f"the scores of {num_bad} of {len(scores)} histories are NaN",
                            fix="use a lower --lr (metrics.jsonl of the run has the losses)"
                            if model.trained_by_gradient() else
                            f"correct the scores in {type(model).__name__}.recommend; --lr has no effect on them")
    return Predictions(positions, sequences.item[positions], items, scores)


def metrics(predictions: Predictions, num_items: int) -> dict:
    """Return every metric of metrics.py with its standard error, and the shares of faulty positions in the lists.

    Each event has one relevant item. Of all positions in the lists, `missing_share` have no item, `duplicate_share`
    repeat an item of the same list, and `invalid_share` have an item that is not in the catalogue.
    """
    lists = _ranked_lists(predictions, num_items)
    listed = np.sort(lists.items, axis=1)
    repeated = (listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)
    return {"num_targets": len(lists.ranks), **measure(lists),
            "missing_share": float((lists.items == -1).mean()),
            "invalid_share": float(((lists.items < -1) | (lists.items >= num_items)).mean()),
            "duplicate_share": float(repeated.sum() / lists.items.size)}


def evaluate(model: AbstractRecommender, sequences: Sequences, split: str, params: dict,
             title: str = "") -> tuple[Predictions, dict]:
    """Return the predictions for the events of a split and all their metrics, also by popularity of the targets."""
    num_items = model.catalogue.num_items
    predictions = predict(model, sequences, split, params, title)
    result = metrics(predictions, num_items)
    result["num_without_history"] = sequences.num_without_history(split)
    result["by_popularity"] = by_popularity(predictions, sequences.training_counts(num_items))
    return predictions, result


def _ranked_lists(predictions: Predictions, num_items: int) -> RankedLists:
    hit = predictions.items == predictions.targets[:, None]                       # (B, k)
    return RankedLists(np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, np.inf), predictions.items, num_items)


def by_popularity(predictions: Predictions, counts: np.ndarray) -> dict[str, dict]:
    """Return Recall@10 and NDCG@10 for targets of different popularity.

    counts: (N,) training events of each item

    Items without training events are `cold`. The other items, sorted by popularity, are split into `tail`, `middle`
    and `head`, so that each of the three has about a third of the training events.
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
    """The best items for each history, best first."""

    items: np.ndarray     # (H, k) int64; -1 is an empty position
    scores: np.ndarray    # (H, k)
    fallback: np.ndarray  # (H,) bool: the history has no known items, so the list has the most popular items


def rank(model: AbstractRecommender, histories: Histories, popularity: np.ndarray, params: dict, top_k: int,
         filter_seen: bool = False, device: torch.device | str = "cpu") -> Ranking:
    """Rank at most `top_k` items for each history; an empty history gets the most popular items.

    popularity: (N,) training events of each item, which are also the scores for an empty history
    filter_seen: exclude the items of the history
    """
    num_items, lengths = len(popularity), histories.lengths
    width = min(top_k, num_items)
    best = top_items(torch.from_numpy(popularity).double().unsqueeze(0), width)
    items, scores = (part.numpy().repeat(len(lengths), axis=0) for part in best)
    row = np.repeat(np.arange(len(lengths)), lengths)
    sequences = Sequences(histories.items, row, np.zeros(len(row), dtype=np.int8), device)
    nonempty = np.flatnonzero(lengths)
    shown = (Progress("recommend", len(nonempty), "histories") if len(nonempty) > params["eval_batch_size"]
             else nullcontext())
    with shown as progress:
        items[nonempty], scores[nonempty] = rank_windows(
            model, sequences, Spans(histories.offsets[:-1][nonempty], histories.offsets[1:][nonempty]), params, width,
            filter_seen, progress)
    return Ranking(items, scores, lengths == 0)


@torch.no_grad()
def rank_windows(model: AbstractRecommender, sequences: Sequences, histories: Spans, params: dict, top_k: int,
                 filter_seen: bool, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the best items for each history and their scores, (H, top_k) each; an empty position is -1 with -inf.

    histories: spans of events; the model reads only the newest `max_history` events of each
    filter_seen: exclude the items of the whole history

    A batch has histories of similar length, which limits the padding. With several
    processes, each ranks a part of the batches. The result for a history does not depend on the other histories.
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
    """Return `row * N + item` for each item of each window, sorted and without duplicates."""
    lengths = ends - starts
    row = np.repeat(np.arange(len(starts)), lengths)
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.unique(row * num_items + item[starts[row] + within])


def _seen_by(batch: np.ndarray, seen: np.ndarray, num_items: int) -> torch.Tensor:
    """Return the items in each history of a batch, (B, S), padded at the end. `seen` is the result of `_seen`."""
    begin, end = (np.searchsorted(seen, (batch + step) * num_items)[:, None] for step in (0, 1))
    place = begin + np.arange((end - begin).max())
    return torch.from_numpy(np.where(place < end, seen[np.minimum(place, len(seen) - 1)] % num_items, PADDING))
