"""A fitted count: a sparse matrix of weights between items, read with the newest items of a history."""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

# B batch, W length of the longest history, N items, C entries of the matrix

SMOOTHING = 0.02  # share of the popularity in the probabilities


class Counts(nn.Module):
    """Scores of the items from a sparse matrix M.

    The score of item j is the sum of `recency ** lag * M[h, j]` over the `num_newest` newest items h of the history.
    The newest item has lag 0. Before `fill`, the buffers of the matrix are empty; a checkpoint can fill them.
    """

    row_starts: Tensor  # (N + 1,) int64, the entries of row i have the indices from row_starts[i] to row_starts[i + 1]
    columns: Tensor     # (C,) int32, column of each entry
    values: Tensor      # (C,) float32, above 0
    popularity: Tensor  # (N,) int64, number of training events of each item
    num_newest: Tensor  # () int64
    recency: Tensor     # () float64

    def __init__(self, num_items: int):
        super().__init__()
        self.num_items = num_items
        self.register_buffer("row_starts", torch.zeros(num_items + 1, dtype=torch.int64))
        self.register_buffer("columns", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(0, dtype=torch.float32))
        self.register_buffer("popularity", torch.zeros(num_items, dtype=torch.int64))
        self.register_buffer("num_newest", torch.ones((), dtype=torch.int64))
        self.register_buffer("recency", torch.ones((), dtype=torch.float64))

    def fill(self, matrix: sparse.csr_matrix, popularity: np.ndarray, num_newest: int, recency: float) -> None:
        """Set all buffers. The matrix (N, N) must not have two entries for the same pair of items."""
        device = self.row_starts.device
        self.row_starts = torch.from_numpy(matrix.indptr.astype(np.int64)).to(device)
        self.columns = torch.from_numpy(matrix.indices.astype(np.int32, copy=False)).to(device)
        self.values = torch.from_numpy(matrix.data.astype(np.float32, copy=False)).to(device)
        self.popularity = torch.from_numpy(popularity.astype(np.int64)).to(device)
        self.num_newest.fill_(num_newest)
        self.recency.fill_(recency)

    def find_problem(self) -> str:
        """Return what is wrong with the buffers, or "" if they are valid."""
        starts, num_entries = self.row_starts, len(self.columns.view(-1))
        if self.columns.ndim != 1 or self.columns.shape != self.values.shape:
            return "must have one value per column"
        if starts[0] != 0 or starts[-1] != num_entries or (starts[1:] < starts[:-1]).any():
            return f"row_starts must rise from 0 to the number of columns, {num_entries}"
        if ((self.columns < 0) | (self.columns >= self.num_items)).any():
            return f"columns must be items from 0 to {self.num_items - 1}"
        if (self.values < 0).any() or (self.popularity < 0).any():
            return "values and popularity must be at least 0"
        if self.num_newest < 1 or not 0 <= self.recency <= 1:
            return "num_newest must be at least 1, and recency must be from 0 to 1"
        return ""

    def row_sums(self) -> Tensor:
        """Return the sum of each row of the matrix: (N,) float64."""
        sums = torch.zeros(self.num_items, dtype=torch.float64, device=self.values.device)
        return sums.scatter_add_(0, torch.repeat_interleave(self.row_starts.diff()), self.values.double())

    def entries(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the entries in the rows of some items, and to which of the rows each one belongs.

        items: (R,) -> two tensors with one element for each entry of these R rows
        """
        first = self.row_starts[items]
        size = self.row_starts[items + 1] - first
        row = torch.repeat_interleave(size)
        begin = first - (size.cumsum(0) - size)
        return row, torch.arange(len(row), device=items.device) + begin[row]

    def scores(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Return the scores of all items for each history: (B, N) float64.

        items: (B, W) oldest item first, with padding at the end of shorter rows
        lengths: (B,)
        """
        scores = torch.zeros(len(items) * self.num_items, dtype=torch.float64, device=items.device)
        # One lag at a time: then no item gets two values at once, so the result does not depend on the order of the
        # additions on a GPU.
        place = lengths - 1 - torch.arange(min(int(self.num_newest), items.shape[1]), device=items.device).unsqueeze(1)
        item = items.T.gather(0, place.clamp(min=0))                                  # (lags, B)
        first = self.row_starts[item]
        size = (self.row_starts[item + 1] - first).masked_fill(place < 0, 0)
        for lag, num_entries in enumerate(size.sum(dim=1).tolist()):
            # Entry e of the rows of all histories is entry `entry[e]` of the matrix.
            row = torch.repeat_interleave(size[lag], output_size=num_entries)
            begin = first[lag] - (size[lag].cumsum(0) - size[lag])
            entry = torch.arange(num_entries, device=items.device) + begin[row]
            scores.scatter_add_(0, row * self.num_items + self.columns[entry],
                                self.values[entry].double() * self.recency**lag)
        return scores.view(len(items), self.num_items)

    def log_probabilities(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Return log p of all items for each history: (B, N) float32.

        p is a mixture of the scores and of popularity + 1, each divided by its sum. If all scores are 0, p has only the
        popularity.
        """
        found = self.scores(items, lengths)
        total = found.sum(dim=1, keepdim=True)
        smoothed = (self.popularity + 1).double()
        smoothed = smoothed / smoothed.sum()                                       # (N,)
        # In place, because these are the largest tensors of a search with a prior.
        found *= (1 - SMOOTHING) / total.clamp(min=1e-300)
        found.addcmul_(torch.where(total > 0, SMOOTHING, 1.0).to(found), smoothed)
        return found.log_().float()
