"""A teacher: targets from a count of the training events, for models that are trained by gradient descent."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recommendation.counting.counts import SMOOTHING, Counts
from recommendation.decoding.top_k import PADDING

# B batch, W length of the longest window, G targets of a row, N items, C entries of the matrix

MAX_DISTRIBUTION_ITEMS = 4_000  # with more items, a distribution for every position would need too much time


class CountTeacher:
    """Replaces targets by items that follow the same history in a count.

    The target of a position is the next item with probability `1 - weight`. Otherwise, it is drawn from the
    distribution of the count (see `Counts.log_probabilities`), given the items of the window up to this position. The
    count knows rare items; a model that learns from it needs fewer events. The tensors of a step have fixed shapes, so
    that the step can be captured.
    """

    def __init__(self, counts: Counts, weight: float, unseen: bool):
        """unseen: whether to draw no item of the history"""
        self.counts, self.weight, self.unseen = counts, weight, unseen
        self.row_sums = counts.row_sums()                                                          # (N,)
        self.cumulative = counts.values.double().cumsum(0)                                         # (C,)
        popularity = (counts.popularity + 1).double()
        self.popularity = popularity / popularity.sum()
        self.gives_distributions = counts.num_items <= MAX_DISTRIBUTION_ITEMS
        self.matrix = counts.dense() if self.gives_distributions else None                         # (N, N) float32
        self._decays: dict[int, Tensor] = {}
        self.num_calls = 0  # a model that ignores its teacher never calls it

    def draw(self, items: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """Replace some of the targets by drawn items: (B, G) -> (B, G).

        items, lengths: (B, W) and (B,) windows
        With G = W - 1, the targets are the next items of every position. With G = 1, they are the last items of the
        rows. If a drawn item must not be a target because it is in the history, the next item stays the target.
        """
        self.num_calls += 1
        width = items.shape[1]
        position = torch.arange(width, device=items.device)
        # The newest item before each target, and the weights of all items before it.
        newest = (position[:-1].unsqueeze(0) if targets.shape[1] == width - 1 else
                  (lengths - 2).clamp(min=0).unsqueeze(1))                                 # (1 or B, G)
        mass = self._decay(width)[newest] * self._row_sums(items).unsqueeze(1)                     # (B, G, W)
        mass = mass.cumsum(dim=2)
        total = mass[:, :, -1]
        chance, *chances = torch.rand(4, *targets.shape, dtype=torch.float64, device=items.device)
        place = torch.searchsorted(mass, (chances[0] * total).unsqueeze(2), right=True).clamp(max=width - 1)
        if len(self.counts.columns):
            drawn = self._follower(items.gather(1, place.squeeze(2)).clamp(min=0), chances[1])
        else:
            drawn = targets  # no item follows another one, so every drawn item comes from the popularity
        popular = torch.searchsorted(self.popularity.cumsum(0), chances[2]).clamp(max=len(self.popularity) - 1)
        # `chance` decides two things: below `weight`, the item is drawn; in the lower part, from the popularity.
        drawn = torch.where((chance < SMOOTHING * self.weight) | (total <= 0), popular, drawn)
        replaced = (chance < self.weight) & (targets != PADDING)
        if self.unseen:
            visible = position <= newest.unsqueeze(2)                                              # (1 or B, G, W)
            replaced &= ~((drawn.unsqueeze(2) == items.unsqueeze(1)) & visible).any(dim=2)
        return torch.where(replaced, drawn, targets)

    def distributions(self, items: Tensor) -> Tensor:
        """Return the probability of every item as the target of each position: (B, W) windows -> (W - 1, B, N)."""
        assert self.matrix is not None
        self.num_calls += 1
        items, targets = items[:, :-1].T, items[:, 1:].T                                           # (W - 1, B) each
        rows = self.matrix[items.clamp(min=0)] * (items != PADDING).unsqueeze(2)
        scores = (self._decay(len(items)).float() @ rows.flatten(1)).view(rows.shape)              # (W - 1, B, N)
        total = scores.sum(dim=2, keepdim=True)
        known = (1 - SMOOTHING) * (total > 0)
        popularity = self.popularity.float()
        found = scores * (known / total.clamp(min=1e-30)) + (1 - known) * popularity
        if self.unseen:
            # Position t excludes the items 0 to t. Its row has W - 1 entries, so item t is repeated.
            position = torch.arange(len(items), device=items.device)
            earlier = torch.minimum(position.unsqueeze(0), position.unsqueeze(1))                  # (W - 1, W - 1)
            seen = items.clamp(min=0)[earlier].transpose(1, 2)                                     # (W - 1, B, W - 1)
            found = found.scatter(2, seen, 0.0)
            found = found / found.sum(dim=2, keepdim=True).clamp(min=1e-30)
        next_items = targets.clamp(min=0).unsqueeze(2)
        share = 1 - self.weight * found.sum(dim=2, keepdim=True)  # all, if the history has the whole catalogue
        return (self.weight * found).scatter_add(2, next_items, share)

    def _row_sums(self, items: Tensor) -> Tensor:
        return self.row_sums[items.clamp(min=0)] * (items != PADDING)

    def _follower(self, source: Tensor, chance: Tensor) -> Tensor:
        """Draw an item from the row of each source item: (B, G) -> (B, G). Rows without entries give any item."""
        counts = self.counts
        first, end = counts.row_starts[source], counts.row_starts[source + 1]
        before = F.pad(self.cumulative, (1, 0))[first]
        entry = torch.searchsorted(self.cumulative, before + chance * self.row_sums[source], right=True)
        entry = torch.minimum(entry, end - 1).clamp(min=0)
        return counts.columns[entry].long()

    def _decay(self, width: int) -> Tensor:
        """Return the weight of item j for position t: (W, W) float64, 0 for later items."""
        if width not in self._decays:
            position = torch.arange(width, device=self.row_sums.device)
            lag = position.unsqueeze(1) - position
            inside = (lag >= 0) & (lag < self.counts.num_newest)
            self._decays[width] = torch.where(inside, self.counts.recency ** lag.clamp(min=0), 0.0)
        return self._decays[width]
