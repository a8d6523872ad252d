"""Selection of the k items with the best scores."""

from typing import NamedTuple

import torch
from torch import Tensor

# B batch, N items, k items in a list, S largest number of seen items in a history

PADDING = -1  # fills the end of shorter rows in tensors of items


class Recommendations(NamedTuple):
    """The best items for each history, best first. An empty position has item -1 and score -inf."""

    items: Tensor   # (B, k) int64
    scores: Tensor  # (B, k) float


class Prior(NamedTuple):
    """Probabilities of the items from another model. A search adds `weight * log_probabilities` to the scores."""

    log_probabilities: Tensor  # (B, N) finite
    weight: Tensor             # (B, 1) at least 0

    def added(self) -> Tensor:
        """Return the values to add to the scores: (B, N)."""
        return self.weight * self.log_probabilities


def in_row(items: Tensor, values: Tensor) -> Tensor:
    """Return for each value whether the same row of `items` contains this value.

    items: (B, S), values: (B, any size) -> bool, (B, same size)
    """
    items = items.sort(dim=1).values
    place = torch.searchsorted(items, values.contiguous()).clamp(max=items.shape[1] - 1)
    return items.gather(1, place) == values


def top_items(scores: Tensor, top_k: int, seen: Tensor | None = None) -> Recommendations:
    """Return the `top_k` items with the best scores in each row.

    scores: (B, N)
    seen: (B, S) items to exclude, with PADDING at the end of shorter rows

    If scores are equal, the item with the smaller index is first. An item with the score -inf is not listed.
    """
    if seen is not None:
        # `clamp` turns PADDING into item 0. The limit is inf there, so the score of item 0 does not change.
        limit = torch.where(seen == PADDING, float("inf"), float("-inf")).to(scores.dtype)
        scores = scores.scatter_reduce(1, seen.clamp(min=0), limit, "amin")
    k = min(top_k, scores.shape[1])
    best, items = scores.topk(k, dim=1)
    # `topk` is 30 times as fast as sorting all items, but it may select any of the items with equal scores. Sort all
    # items only in rows where an item outside the top k has the same score as the last item in the top k. In the other
    # rows, `in_order` sorts the k items.
    tied = (scores >= best[:, -1:]).sum(dim=1) > k
    if tied.any():
        values, order = scores[tied].sort(dim=1, descending=True, stable=True)
        best[tied], items[tied] = values[:, :k], order[:, :k]
    items = items.masked_fill(best == float("-inf"), PADDING)
    return in_order(items, best, top_k)


def in_order(items: Tensor, scores: Tensor, top_k: int) -> Recommendations:
    """Sort the items of each row by score, and return the `top_k` best: (B, any size) -> (B, top_k).

    If scores are equal, the item with the smaller index is first. If a row has fewer than `top_k` items, the remaining
    positions have item -1 and score -inf.
    """
    items, by_id = items.sort(dim=1)
    scores, by_score = scores.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, by_score)
    missing = (len(items), max(top_k - items.shape[1], 0))
    return Recommendations(torch.cat([items, items.new_full(missing, -1)], dim=1)[:, :top_k],
                           torch.cat([scores, scores.new_full(missing, float("-inf"))], dim=1)[:, :top_k])
