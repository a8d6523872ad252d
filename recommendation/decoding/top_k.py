"""Lists of the best items of scores."""

from typing import NamedTuple

import torch
from torch import Tensor

# B batch, N items, k results, S most seen items of a history

PADDING = -1  # in item tensors, behind the last item of a row; never an item


class Recommendations(NamedTuple):
    """The best items of each history, best first; where fewer exist, item -1 with score -inf."""

    items: Tensor   # (B, k) int64
    scores: Tensor  # (B, k) float


def in_row(items: Tensor, values: Tensor) -> Tensor:
    """Which of the values (B, any number) are in their row of items (B, S)."""
    items = items.sort(dim=1).values
    place = torch.searchsorted(items, values.contiguous()).clamp(max=items.shape[1] - 1)
    return items.gather(1, place) == values


def top_items(scores: Tensor, top_k: int, seen: Tensor | None = None) -> Recommendations:
    """The best of dense scores (B, N) without the items `seen` (B, S); among equals the smaller item id."""
    if seen is not None:
        # PADDING falls on item 0, where a minimum with inf changes nothing.
        limit = torch.where(seen == PADDING, float("inf"), float("-inf")).to(scores.dtype)
        scores = scores.scatter_reduce(1, seen.clamp(min=0), limit, "amin")
    k = min(top_k, scores.shape[1])
    best, items = scores.topk(k, dim=1)
    # Sorting all items takes thirty times as long. `topk` leaves open which of equals it takes at the end, and in
    # which order equals stand: rows with such an end are sorted, and the others' few results are put in order.
    open_end = (scores >= best[:, -1:]).sum(dim=1) > k
    if open_end.any():
        values, order = scores[open_end].sort(dim=1, descending=True, stable=True)
        best[open_end], items[open_end] = values[:, :k], order[:, :k]
    if seen is not None:
        items = items.masked_fill(best == float("-inf"), PADDING)
    return in_order(items, best, top_k)


def in_order(items: Tensor, scores: Tensor, top_k: int) -> Recommendations:
    """The best of some items with their scores, (B, any number); among equals the smaller item id.

    Item -1 with score -inf is no item, and fills up where there are too few.
    """
    items, by_id = items.sort(dim=1)
    scores, by_score = scores.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, by_score)
    missing = (len(items), max(top_k - items.shape[1], 0))
    return Recommendations(torch.cat([items, items.new_full(missing, -1)], dim=1)[:, :top_k],
                           torch.cat([scores, scores.new_full(missing, float("-inf"))], dim=1)[:, :top_k])
