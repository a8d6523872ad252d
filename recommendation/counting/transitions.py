"""Transitions: how often one item comes after another item, at most a few training events later."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import sparse

from common.errors import DataError

# E training events, N items, P pairs of events, C cells: pairs of different items that occur

# Maximum number of pairs of events, in both directions. A pair needs up to 13 bytes here, and 8 bytes in the matrix of
# each of the two protocols. Together with the events, a fit then needs less than 4 GB.
MAX_PAIRS = 40_000_000
BLOCK_PAIRS = 4_000_000  # pairs that are sorted at a time


def num_pairs(offsets: np.ndarray, max_distance: int) -> int:
    """Return the number of pairs of training events that are at most `max_distance` apart, in both directions.

    offsets: (U + 1,) the events of user u have the indices from offsets[u] to offsets[u + 1] - 1
    """
    lengths = np.diff(offsets)
    return sum(2 * int(np.maximum(lengths - distance, 0).sum()) for distance in range(1, max_distance + 1))


def largest_distance(offsets: np.ndarray, limit: int, max_pairs: int = MAX_PAIRS) -> int:
    """Return the largest distance, up to `limit`, with at most `max_pairs` pairs of training events.

    Raises DataError if even the distance 1 has more pairs.
    """
    if (found := num_pairs(offsets, 1)) > max_pairs:
        raise DataError("interactions.parquet", f"has {found // 2:,} pairs of consecutive training events",
                        f"The transitions of at most {max_pairs // 2:,} pairs fit in the memory",
                        "use a dataset with fewer events, or --prior none, --teacher none or another model")
    return next(distance for distance in range(limit, 0, -1) if num_pairs(offsets, distance) <= max_pairs)


class Pairs(NamedTuple):
    """The pairs of training events that are at most `max_distance` apart, sorted by their items.

    Each pair of items that occurs is a cell of a sparse matrix in compressed row format. A pair of events belongs to
    two cells: (earlier item, later item) is the forward direction, and (later item, earlier item) the backward
    direction. Pairs of an item with itself are left out.
    """

    row_starts: np.ndarray  # (N + 1,) int64, first cell of each row
    columns: np.ndarray     # (C,) int32, the second item of each cell
    starts: np.ndarray      # (C,) int64, first pair of each cell
    kinds: np.ndarray       # (P,) uint8, distance - 1 if the pair is forward; max_distance is added if it is backward
    popularity: np.ndarray  # (N,) number of training events of each item
    max_distance: int

    def matrix(self, max_distance: int, distance_decay: float, backward: float, source_exponent: float,
               popularity_exponent: float) -> sparse.csr_matrix:
        """Return the transition matrix T, (N, N) float32.

        C[i, j] is the sum of `distance_decay ** (distance - 1)` over the forward pairs (i, j), and of `backward` times
        that over the backward pairs. T[i, j] is C[i, j] / (sum of row i) ** source_exponent /
        (popularity of j) ** popularity_exponent.
        """
        distance = np.arange(self.max_distance)
        weight = np.where(distance < max_distance, float(distance_decay) ** distance, 0)
        weight = np.concatenate([weight, backward * weight]).astype(np.float32)   # (2 * max_distance,) of each kind
        values = np.add.reduceat(weight[self.kinds], self.starts) if len(self.starts) else np.zeros(0, np.float32)
        kept = values > 0
        row_starts = np.concatenate([[0], np.cumsum(kept)])[self.row_starts]
        size = len(self.popularity)
        matrix = sparse.csr_matrix((values[kept], self.columns[kept], row_starts), (size, size))
        row_sums = np.maximum(matrix @ np.ones(size, dtype=np.float32), 1e-12)
        matrix.data *= np.repeat(row_sums ** np.float32(-source_exponent), np.diff(row_starts))
        matrix.data *= (np.maximum(self.popularity, 1) ** -float(popularity_exponent)).astype(np.float32)[
            matrix.indices]
        return matrix


def count_pairs(items: np.ndarray, offsets: np.ndarray, num_items: int, max_distance: int,
                block_pairs: int = BLOCK_PAIRS) -> Pairs:
    """Find the pairs of training events that are at most `max_distance` apart.

    items: (E,) the training items of all users, one user after another
    offsets: (U + 1,) as in `num_pairs`
    block_pairs: about the number of pairs to sort at a time
    """
    place = np.arange(len(items), dtype=np.int32) - np.repeat(offsets[:-1], np.diff(offsets)).astype(np.int32)
    popularity = np.bincount(items, minlength=num_items)
    sizes, columns, starts, kinds, num_before = [], [], [], [], 0
    for first, end in _blocks(popularity, max(block_pairs // (2 * max_distance), 1)):
        keys = _sorted_keys(items, place, first, end, num_items, max_distance)
        cell = keys // (2 * max_distance)
        start = np.flatnonzero(np.concatenate([cell[:1] >= 0, cell[1:] != cell[:-1]]))
        kinds.append((keys % (2 * max_distance)).astype(np.uint8))
        row, column = np.divmod(cell[start], num_items)
        columns.append(column.astype(np.int32))
        starts.append(start + num_before)
        sizes.append(np.bincount(row, minlength=end - first))
        num_before += len(keys)
    row_starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Pairs(row_starts, np.concatenate(columns), np.concatenate(starts), np.concatenate(kinds), popularity,
                 max_distance)


def _blocks(popularity: np.ndarray, num_events: int) -> Iterator[tuple[int, int]]:
    """Split the items into ranges (first, end) with about `num_events` training events each."""
    block = np.cumsum(popularity) // num_events
    borders = np.flatnonzero(block[1:] != block[:-1]) + 1
    return zip([0, *borders.tolist()], [*borders.tolist(), len(popularity)], strict=True)


def _sorted_keys(items: np.ndarray, place: np.ndarray, first: int, end: int, num_items: int,
                 max_distance: int) -> np.ndarray:
    """Return a number for each pair of events whose row is from `first` to `end - 1`, sorted by row, column and kind.

    place: (E,) position of each event in the sequence of its user
    """
    keys = []
    for distance in range(1, max_distance + 1):
        later = np.flatnonzero(place >= distance)
        one, two = items[later - distance], items[later]
        for kind, row, column in ((distance - 1, one, two), (max_distance + distance - 1, two, one)):
            inside = (row >= first) & (row < end) & (row != column)
            keys.append(((row[inside] - first) * num_items + column[inside]) * (2 * max_distance) + kind)
    sorted_keys = np.concatenate(keys)
    sorted_keys.sort()
    return sorted_keys
