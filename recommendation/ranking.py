"""The best items for any histories, whole batches at a time."""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from common.distributed import fill_in, world_size
from common.distributed import rank as process_number
from common.progress import Progress
from recommendation.dataset import Sequences
from recommendation.histories import Histories
from recommendation.models.abstract_model import AbstractRecommender, top_items

# H histories, N items, k results

USUAL_REQUEST = 64  # items of a history; those that ask for more get smaller batches, as a search grows with both


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
        items[asked], scores[asked] = rank_windows(model, sequences, histories.offsets[:-1][asked],
                                                   histories.offsets[1:][asked], width, num_items, params,
                                                   filter_seen, progress)
    return Ranking(items, scores, lengths == 0)


@torch.no_grad()
def rank_windows(model: AbstractRecommender, sequences: Sequences, starts: np.ndarray, ends: np.ndarray, top_k: int,
                 num_items: int, params: dict, filter_seen: bool, progress: Progress | None
                 ) -> tuple[np.ndarray, np.ndarray]:
    """(H, k) items and scores behind the events `starts[i]` up to, not including, `ends[i]`; -1 and -inf for none.

    The newest `max_history` of them are read, all of them are left out if `filter_seen`. Batches hold like
    lengths, so that little padding is computed; of several processes each asks about every so many of them. What
    a history gets does not depend on the others.
    """
    items = np.zeros((len(starts), top_k), dtype=np.int64)
    scores = np.zeros(items.shape)
    seen = _seen(sequences.item, starts, ends, num_items) if filter_seen else np.empty(0, dtype=np.int64)
    requests = _requests(top_k, np.bincount(seen // num_items, minlength=len(starts)))
    read_from = np.maximum(starts, ends - params["max_history"])
    batches = _batches(requests, ends - read_from, params["eval_batch_size"])
    for batch in batches[process_number()::world_size()]:
        result = model.recommend(sequences.windows(read_from[batch], ends[batch]), int(requests[batch[0]]))
        found, score = result.items.cpu().numpy(), result.scores.cpu().numpy()
        kept = (found != -1) & ~_contains(seen, batch[:, None] * num_items + found)
        order = np.argsort(~kept, axis=1, kind="stable")[:, :top_k]  # what is left out goes behind the rest
        items[batch] = np.take_along_axis(np.where(kept, found, -1), order, axis=1)
        scores[batch] = np.take_along_axis(np.where(kept, score, -np.inf), order, axis=1)
        if progress is not None:
            progress.update(len(batch) * world_size())
    fill_in(items, scores)
    return items, scores


def _seen(item: np.ndarray, starts: np.ndarray, ends: np.ndarray, num_items: int) -> np.ndarray:
    """Ordered `row * N + item`, once for each item of each window."""
    lengths = ends - starts
    row = np.repeat(np.arange(len(starts)), lengths)
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.unique(row * num_items + item[starts[row] + within])


def _requests(top_k: int, num_seen: np.ndarray) -> np.ndarray:
    """How many items each history asks for, (H,): enough for those that are left out.

    Their number is rounded up to a power of two, so that many histories share a batch: a beam search of another
    width may find other items, and what a history gets must not depend on its neighbours.
    """
    return top_k + np.where(num_seen > 0, 2 ** np.ceil(np.log2(np.maximum(num_seen, 1))), 0).astype(np.int64)


def _batches(requests: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The histories with items, in batches of one request and like lengths."""
    order = np.lexsort((-lengths, requests))
    batches = []
    for group in np.split(order, np.flatnonzero(np.diff(requests[order])) + 1):
        size = max(batch_size * USUAL_REQUEST // max([USUAL_REQUEST, *requests[group[:1]]]), 1)
        batches += [group[start:start + size] for start in range(0, len(group), size)]
    return batches


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the values, of any shape, are among the ordered ones."""
    if not len(ordered):
        return np.zeros(values.shape, dtype=bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
