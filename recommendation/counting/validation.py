"""Fast ranks of the targets of validation events, for the search of settings."""

from typing import NamedTuple

import numpy as np
from scipy import sparse

# V validation events, N items, S distinct items of all histories together

BLOCK_EVENTS = 500         # events that are ranked at a time
DENSE_SHARE = 0.1          # a matrix with a larger share of entries is used as a dense matrix, which is faster then
DENSE_CELLS = 20_000_000   # the same for the scores of a block, if there are at most this many
CUTOFF = 10


class HeldOutLast(NamedTuple):
    """Training sequences without their last events, and these events."""

    items: np.ndarray    # the remaining training items of all users, one user after another
    offsets: np.ndarray  # (U + 1,) as in `AbstractRecommender.fit`
    starts: np.ndarray   # (V,) the history of event v is items[starts[v]:ends[v]] of the whole training items
    ends: np.ndarray     # (V,)


def hold_out_last(items: np.ndarray, offsets: np.ndarray) -> HeldOutLast:
    """Hold out the last training event of each user who has at least two of them."""
    several = np.diff(offsets) > 1
    starts, ends = offsets[:-1][several], offsets[1:][several] - 1
    return HeldOutLast(np.delete(items, ends), offsets - np.concatenate([[0], np.cumsum(several)]), starts, ends)


class Validation:
    """Validation events, and the NDCG@10 that a matrix of weights reaches on them."""

    def __init__(self, items: np.ndarray, starts: np.ndarray, ends: np.ndarray, popularity: np.ndarray):
        """items, starts, ends: the events as in `HeldOut`; popularity: (N,) number of training events of each item"""
        self.items, self.starts, self.ends = items, starts, ends
        self.targets, self.num_items = items[ends], len(popularity)
        order = np.argsort(-popularity, kind="stable")
        self.place = np.empty(self.num_items, dtype=np.int64)  # (N,) 0 is the most popular item
        self.place[order] = np.arange(self.num_items)
        row, _, item = self._history(np.arange(len(starts)), int((ends - starts).max(initial=0)))
        self.seen = np.unique(row * self.num_items + item)     # (S,) one number for each history and item in it

    def ndcg(self, matrix: sparse.csr_matrix, num_newest: int, recency: float) -> tuple[float, float]:
        """Return NDCG@10 among all items and among the items that are not in the history.

        matrix: (N, N) as in `Counts`
        """
        if not len(self.ends):
            return 0.0, 0.0
        is_dense = matrix.nnz > DENSE_SHARE * self.num_items**2
        weights = matrix.toarray() if is_dense else matrix
        events = np.arange(len(self.ends))
        ranks = np.concatenate([self._ranks(weights, num_newest, recency, events[first:first + BLOCK_EVENTS])
                                for first in range(0, len(events), BLOCK_EVENTS)], axis=1)  # (2, V)
        gains = np.where(ranks < CUTOFF, 1 / np.log2(ranks + 2), 0)
        all_items, unseen_items = gains.mean(axis=1).tolist()
        return all_items, unseen_items

    def _history(self, events: np.ndarray, num_newest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the newest items of the histories: for each of them, the index in `events`, the lag and the item."""
        lengths = np.minimum(self.ends[events] - self.starts[events], num_newest)
        row = np.repeat(np.arange(len(events)), lengths)
        lag = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return row, lag, self.items[self.ends[events][row] - 1 - lag]

    def _ranks(self, matrix: sparse.csr_matrix | np.ndarray, num_newest: int, recency: float,
               events: np.ndarray) -> np.ndarray:
        """Return the rank of each target among all items and among the unseen items, from 0: (2, events)."""
        row, lag, item = self._history(events, num_newest)
        weights = sparse.csr_matrix(((recency ** lag).astype(np.float32), (row, item)), (len(events), self.num_items))
        scores = sparse.csr_matrix(weights @ matrix)     # without the scores that are 0
        table = scores.toarray() if len(events) * self.num_items <= DENSE_CELLS else scores
        target = self.targets[events]
        own = np.asarray(table[np.arange(len(events)), target]).ravel()
        place = self.place[target]
        sizes = np.diff(scores.indptr)
        own_of_entry = np.repeat(own, sizes)
        better = scores.data > own_of_entry
        tied = np.flatnonzero(scores.data == own_of_entry)
        row_of_tied = np.searchsorted(scores.indptr, tied, side="right") - 1
        better[tied] = self.place[scores.indices[tied]] < place[row_of_tied]
        ranks = np.diff(np.concatenate([[0], np.cumsum(better)])[scores.indptr])
        # If the score of the target is 0, more popular items with the score 0 are better, too.
        popular = np.flatnonzero(own == 0)
        entries = scores[popular]
        counted = self.place[entries.indices] < np.repeat(place[popular], np.diff(entries.indptr))
        ranks[popular] += place[popular] - np.diff(np.concatenate([[0], np.cumsum(counted)])[entries.indptr])

        first, end = np.searchsorted(self.seen, [events[0] * self.num_items, (events[-1] + 1) * self.num_items])
        row, item = np.divmod(self.seen[first:end], self.num_items)
        row = row - events[0]
        score = np.asarray(table[row, item]).ravel()
        better = (score > own[row]) | ((score == own[row]) & (self.place[item] < place[row]))
        unseen = ranks - np.bincount(row[better], minlength=len(events))
        unseen[row[item == target[row]]] = self.num_items + CUTOFF  # a target in the history is not listed
        return np.stack([ranks, unseen])
