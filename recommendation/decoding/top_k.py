"""Top-k lists of items."""

from typing import NamedTuple

import torch
from torch import Tensor

# B batch, N items, k items in a list, S largest number of seen items of a history

PADDING = -1  # fills item tensors after the last item of a row; never an item


class Recommendations(NamedTuple):
    """The best items for each history, best first. Item -1 with score -inf is an empty position."""

    items: Tensor   # (B, k) int64
    scores: Tensor  # (B, k) float


def in_row(items: Tensor, values: Tensor) -> Tensor:
    """Return which values are in their row of items: (B, S), (B, any number) -> (B, any number) bool."""
    items = items.sort(dim=1).values
    place = torch.searchsorted(items, values.contiguous()).clamp(max=items.shape[1] - 1)
    return items.gather(1, place) == values


def top_items(scores: Tensor, top_k: int, seen: Tensor | None = None) -> Recommendations:
    """Return the items with the best scores (B, N), without the items `seen` (B, S).

    Items with equal scores are in the order of their ids.
    """
    if seen is not None:
        # `clamp` turns PADDING into item 0. The limit is inf there, so the score of item 0 does not change.
        limit = torch.where(seen == PADDING, float("inf"), float("-inf")).to(scores.dtype)
        scores = scores.scatter_reduce(1, seen.clamp(min=0), limit, "amin")
    k = min(top_k, scores.shape[1])
    best, items = scores.topk(k, dim=1)
    # `topk` is 30 times as fast as sorting all items, but it does not define which of several equal scores it selects,
    # or in which order. Sort all items only in rows where an item outside the top k has the same score as the last item
    # inside. In the other rows, it is enough that `in_order` below sorts the k items.
    tied = (scores >= best[:, -1:]).sum(dim=1) > k
    if tied.any():
        values, order = scores[tied].sort(dim=1, descending=True, stable=True)
        best[tied], items[tied] = values[:, :k], order[:, :k]
    if seen is not None:
        items = items.masked_fill(best == float("-inf"), PADDING)
    return in_order(items, best, top_k)


def in_order(items: Tensor, scores: Tensor, top_k: int) -> Recommendations:
    """Return the `top_k` best of the given items, from their scores: (B, any number) -> (B, top_k).

    Items with equal scores are in the order of their ids. Item -1 with score -inf is an empty position, which fills
    lists that are too short.
    """
    items, by_id = items.sort(dim=1)
    scores, by_score = scores.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, by_score)
    missing = (len(items), max(top_k - items.shape[1], 0))
    return Recommendations(torch.cat([items, items.new_full(missing, -1)], dim=1)[:, :top_k],
                           torch.cat([scores, scores.new_full(missing, float("-inf"))], dim=1)[:, :top_k])
