"""A Markov chain baseline. It recommends the items that followed the last item most often in training."""

import torch
from torch import Tensor

from ..abstract_model import AbstractRecommender, Catalogue, HeldOut, Windows


class Markov(AbstractRecommender):
    """A first-order Markov chain.

    The score of an item is the number of times that it followed the last item of the history in training. If two items
    followed it equally often, the more popular item has the higher score.
    """

    needs_codes = False

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        self.register_buffer("popularity", torch.zeros(catalogue.num_items, dtype=torch.float64))
        # The transitions in compressed sparse row format. The items that followed item i are
        # followers[row_starts[i]:row_starts[i + 1]].
        self.register_buffer("row_starts", torch.zeros(catalogue.num_items + 1, dtype=torch.int64))
        self.register_buffer("followers", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))

    def fit(self, sequences: list[Tensor], validation: HeldOut) -> bool:
        items, offsets = sequences
        n = self.catalogue.num_items
        # Popularity is less than 1, so one transition adds more to a score than any popularity. Use float64, because
        # float32 would round large scores to the same number.
        counts = torch.bincount(items, minlength=n).double()
        self.popularity = counts / (counts.max() + 1)
        inside = torch.ones(max(len(items) - 1, 0), dtype=torch.bool, device=items.device)
        borders = offsets[1:-1] - 1  # a user's last item and the next user's first item are not a transition
        inside[borders[(borders >= 0) & (borders < len(inside))]] = False
        pairs, times = torch.unique(items[:-1][inside] * n + items[1:][inside], return_counts=True)
        self.followers, self.counts = pairs % n, times.double()
        self.row_starts = torch.searchsorted(pairs, torch.arange(n + 1, device=items.device) * n)
        return True

    def find_problem(self) -> str:
        starts, num_items = self.row_starts, self.catalogue.num_items
        if self.followers.ndim != 1 or self.followers.shape != self.counts.shape:
            return "must have one count per follower"
        if starts[0] != 0 or starts[-1] != len(self.followers) or (starts[1:] < starts[:-1]).any():
            return f"row_starts must rise from 0 to the number of followers, {len(self.followers)}"
        if ((self.followers < 0) | (self.followers >= num_items)).any():
            return f"followers must be items from 0 to {num_items - 1}"
        return ""

    def score_items(self, histories: Windows) -> Tensor:
        last = histories.items.gather(1, histories.lengths.unsqueeze(1) - 1).squeeze(1)  # (B,)
        sizes = self.row_starts[last + 1] - self.row_starts[last]
        row = torch.repeat_interleave(torch.arange(len(last), device=last.device), sizes)
        within = torch.arange(len(row), device=last.device) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        entry = self.row_starts[last][row] + within
        scores = self.popularity.repeat(len(last), 1)
        scores.index_put_((row, self.followers[entry]), self.counts[entry], accumulate=True)
        return scores
