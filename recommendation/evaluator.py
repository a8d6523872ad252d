"""Evaluation of recommenders: rank the items for each history, and compute the metrics."""

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
from recommendation.metrics import METRICS, PROTOCOLS, RankedLists, code_metrics, measure, ndcg, recall
from recommendation.models.abstract_model import AbstractRecommender

# H histories, B targets or batch size, N items, k items in a list, S largest number of seen items in a history

# If the lists are longer than this, the batches are smaller, because a search needs more memory and time per history.
USUAL_LENGTH = 64
BUCKETS = ("cold", "tail", "middle", "head")


def selecting_protocol(sequences: Sequences, params: dict) -> str:
    """Return the protocol that selects the checkpoint and that users get, as the key `filter_seen` says."""
    unseen = params["filter_seen"]
    return "unseen" if unseen is True or (unseen == "auto" and not sequences.has_repeats) else "all"


class Predictions(NamedTuple):
    """The items that a model recommends for each event of a split, and the target of each event."""

    positions: np.ndarray  # (B,) index of each event in `Sequences`
    targets: np.ndarray    # (B,) item of each event
    items: np.ndarray      # (B, k) recommended items, best first; -1 is an empty position
    scores: np.ndarray     # (B, k) scores of `items`

    def ranks(self) -> np.ndarray:
        """Return the rank of each target in its list, from 1; 0 if the target is not in the list: (B,) int32."""
        hit = self.items == self.targets[:, None]
        return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0).astype(np.int32)


def predict(model: AbstractRecommender, sequences: Sequences, split: str, params: dict, protocol: str,
            title: str = "", positions: np.ndarray | None = None) -> Predictions:
    """Recommend items for all events of a split that have a history.

    params: training parameters
    protocol: with `unseen`, all items of the history are excluded, even older items that the model does not read
        because of `max_history`
    positions: only these events of the split, as indices in `sequences`; None for all events
    title: title of the progress bar; if empty, no progress bar is shown

    Raises TrainingError if a score is NaN.
    """
    positions = sequences.positions(split) if positions is None else positions
    with Progress(title, len(positions), "targets", kept=split == "test") if title else nullcontext() as progress:
        items, scores = rank_windows(model, sequences, Spans(sequences.first[positions], positions), params,
                                     params["top_k"], PROTOCOLS[protocol], progress)
    if np.isnan(scores).any():
        num_bad = int(np.isnan(scores).any(axis=1).sum())
        raise TrainingError(type(model).__name__, f"has NaN scores for {num_bad} of {len(scores)} histories",
                            fix="use a lower --lr (the losses are in the file metrics.jsonl of the run)"
                            if model.trained_by_gradient() else
                            f"correct the scores of {type(model).__name__}; --lr has no effect on them")
    return Predictions(positions, sequences.item[positions], items, scores)


def cannot_rank(model: AbstractRecommender, items: np.ndarray, scores: np.ndarray) -> str:
    """Return a warning if a trained model gives the same score to all items of every list, else "".

    items, scores: (H, k) each; -1 is an empty position

    This can happen after training with a very high learning rate, even if all losses are finite.
    """
    several = (items >= 0).sum(axis=1) > 1
    if not model.trained_by_gradient() or not several.any():
        return ""
    found, scores = items[several] >= 0, scores[several]
    if (np.where(found, scores, np.inf).min(axis=1) < np.where(found, scores, -np.inf).max(axis=1)).any():
        return ""
    return (f"recommendation: WARNING: {type(model).__name__} gives the same score to all items of a list, so their "
            "order has no meaning. The training has probably diverged; use a lower --lr")


def metrics(predictions: Predictions, num_items: int) -> dict:
    """Compute the metrics of metrics.py. Also compute three shares, relative to the number of positions in all lists:

    missing_share: positions without an item
    duplicate_share: positions that repeat an item of the same list
    invalid_share: positions with an item that is not in the catalogue
    """
    lists = _ranked_lists(predictions, num_items)
    listed = np.sort(lists.items, axis=1)
    repeated = (listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)
    return {"num_targets": len(lists.ranks), **measure(lists),
            "missing_share": float((lists.items == -1).mean()),
            "invalid_share": float(((lists.items < -1) | (lists.items >= num_items)).mean()),
            "duplicate_share": float(repeated.sum() / lists.items.size)}


def values(predictions: Predictions, num_items: int, name: str) -> np.ndarray:
    """Return the values of a metric such as `ndcg@10`: one per event, (B,), or a single one for all lists, (1,)."""
    kind, _, cutoff = name.partition("@")
    return np.atleast_1d(METRICS[kind].compute(_ranked_lists(predictions, num_items), int(cutoff)))


def evaluate(model: AbstractRecommender, sequences: Sequences, split: str, params: dict, protocol: str,
             title: str = "") -> tuple[Predictions, dict]:
    """Return the predictions for the events of a split, and the results of `metrics` and `by_popularity` for them."""
    num_items = model.catalogue.num_items
    predictions = predict(model, sequences, split, params, protocol, title)
    result = metrics(predictions, num_items)
    result["num_without_history"] = sequences.num_without_history(split)
    if model.catalogue.group_of is not None:
        result |= code_metrics(predictions.items, predictions.targets, model.catalogue.group_of)
    result["by_popularity"] = by_popularity(predictions, sequences.training_counts(num_items))
    return predictions, result


def _ranked_lists(predictions: Predictions, num_items: int) -> RankedLists:
    ranks = predictions.ranks()
    return RankedLists(np.where(ranks > 0, ranks, np.inf), predictions.items, num_items)


def by_popularity(predictions: Predictions, counts: np.ndarray) -> dict[str, dict]:
    """Return Recall@10 and NDCG@10 for four groups of items: `cold`, `tail`, `middle` and `head`.

    counts: (N,) number of training events of each item

    Items without training events are `cold`. The other groups go from unpopular to popular items. Each of them has
    about a third of the training events.
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
    fallback: np.ndarray  # (H,) bool; True if the history is empty; the list then has the most popular items


def rank(model: AbstractRecommender, histories: Histories, popularity: np.ndarray, params: dict, top_k: int,
         filter_seen: bool = False, device: torch.device | str = "cpu") -> Ranking:
    """Return the `top_k` best items for each history, or the most popular items if the history is empty.

    popularity: (N,) number of training events of each item; these are the scores for an empty history
    filter_seen: whether to exclude the items of the history

    If the catalogue has fewer than `top_k` items, the lists are shorter.
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
    """Return the best items for each history, and the scores of these items: (H, top_k) each.

    histories: the range of events of each history; the model reads only the newest `max_history` events of a range
    filter_seen: whether to exclude the items of the whole history

    An empty position in a list has the item -1 and the score -inf. All processes return the same result.
    """
    (starts, ends), num_items = histories, model.catalogue.num_items
    items = np.zeros((len(starts), top_k), dtype=np.int64)
    scores = np.zeros(items.shape)
    seen = _seen(sequences.item, starts, ends, num_items) if filter_seen else None
    read_from = np.maximum(starts, ends - params["max_history"])
    size = max(params["eval_batch_size"] * USUAL_LENGTH // max(USUAL_LENGTH, top_k), 1)
    # The histories of a batch have similar lengths, so they need little padding.
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
    """Return the items of all histories in one sorted array without duplicates.

    If history h contains item i, the array contains the number h * N + i. N is the number of items in the catalogue.
    """
    lengths = ends - starts
    row = np.repeat(np.arange(len(starts)), lengths)
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.unique(row * num_items + item[starts[row] + within])


def _seen_by(batch: np.ndarray, seen: np.ndarray, num_items: int) -> torch.Tensor:
    """Return the distinct items of each history in a batch: (B, S), with padding at the end of shorter rows.

    batch: (B,) indices of histories
    seen: result of `_seen`
    """
    begin, end = (np.searchsorted(seen, (batch + step) * num_items)[:, None] for step in (0, 1))
    place = begin + np.arange((end - begin).max())
    return torch.from_numpy(np.where(place < end, seen[np.minimum(place, len(seen) - 1)] % num_items, PADDING))
