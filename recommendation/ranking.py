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
from recommendation.models.abstract_model import PADDING, AbstractRecommender, top_items

# H histories, N items, k results, B batch, S most seen items of a history

USUAL_LENGTH = 64  # of a list; longer ones get smaller batches, as a search grows with both


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
    fill_in(items, scores)
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
