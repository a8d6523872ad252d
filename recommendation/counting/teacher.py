"""A teacher: targets from a count of the training events, for models that are trained by gradient descent."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from recommendation.counting.counts import SMOOTHING, Counts
from recommendation.decoding.top_k import PADDING

# B batch, W length of the longest window, G targets of a row, N items, C entries of the matrix

MAX_DISTRIBUTION_ITEMS = 4_000  # with more items, a distribution for every position would need too much time


class CountTeacher:
    """Replaces targets by items that follow the same history in a count.

    The target of a position is the next item with probability `1 - weight`. Otherwise, it is drawn from the
    distribution of the count (see `Counts.log_probabilities`) to the power of 1 / `temperature`, given the items of the
    window up to this position. The count knows rare items; a model that learns from it needs fewer events. The tensors
    of a step have fixed shapes, so that the step can be captured.
    """

    def __init__(self, counts: Counts, weight: float, unseen: bool, temperature: float = 1.0):
        """unseen: whether to draw no item of the history
        temperature: below 1, likely items become more likely

        Raises ConfigError if the catalogue is too large for a temperature other than 1.
        """
        self.counts, self.weight, self.unseen, self.temperature = counts, weight, unseen, temperature
        self.gives_distributions = counts.num_items <= MAX_DISTRIBUTION_ITEMS
        if temperature != 1 and not self.gives_distributions:
            raise ConfigError("--teacher_temperature", f"cannot be {temperature:g} for {counts.num_items:,} items",
                              f"This needs a distribution over all items, for at most {MAX_DISTRIBUTION_ITEMS:,} items",
                              "use --teacher_temperature 1")
        self.row_sums = counts.row_sums()                                                          # (N,)
        self.cumulative = counts.values.double().cumsum(0)                                         # (C,)
        popularity = (counts.popularity + 1).double()
        self.popularity = popularity / popularity.sum()
        self.num_newest, self.recency = int(counts.num_newest), float(counts.recency)
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
        chance, *chances = torch.rand(4, *targets.shape, dtype=torch.float64, device=items.device)
        position = torch.arange(items.shape[1], device=items.device)
        # The newest item before each target.
        newest = (position[:-1].unsqueeze(0) if targets.shape[1] == items.shape[1] - 1 else
                  (lengths - 2).clamp(min=0).unsqueeze(1))                                 # (1 or B, G)
        if self.gives_distributions:
            drawn = self._draw_from_distributions(items, newest, chances[0])
        else:
            # `chance` decides two things: below `weight`, the item is drawn; in the lower part, from the popularity.
            drawn = self._draw_entries(items, newest, chance < SMOOTHING * self.weight, chances)
        replaced = (chance < self.weight) & (targets != PADDING)
        if self.unseen:
            visible = position <= newest.unsqueeze(2)                                              # (1 or B, G, W)
            replaced &= ~((drawn.unsqueeze(2) == items.unsqueeze(1)) & visible).any(dim=2)
        return torch.where(replaced, drawn, targets)

    def distributions(self, items: Tensor) -> Tensor:
        """Return the probability of every item as the target of each position: (B, W) windows -> (W - 1, B, N)."""
        self.num_calls += 1
        found = self._probabilities(items[:, :-1].T)
        next_items = items[:, 1:].T.clamp(min=0).unsqueeze(2)
        share = 1 - self.weight * found.sum(dim=2, keepdim=True)  # all, if the history has the whole catalogue
        return (self.weight * found).scatter_add(2, next_items, share)

    def _probabilities(self, items: Tensor) -> Tensor:
        """Return the probability of every item after each position: (P, B) items -> (P, B, N)."""
        assert self.matrix is not None
        rows = self.matrix[items.clamp(min=0)] * (items != PADDING).unsqueeze(2)
        scores = (self._decay(len(items)).float() @ rows.flatten(1)).view(rows.shape)
        # Position t excludes the items 0 to t. Its row has P entries, so item t is repeated.
        position = torch.arange(len(items), device=items.device)
        earlier = torch.minimum(position.unsqueeze(0), position.unsqueeze(1))                      # (P, P)
        return self._normalized(scores, items.clamp(min=0)[earlier].transpose(1, 2))

    def _last_probabilities(self, items: Tensor, newest: Tensor) -> Tensor:
        """Return the probability of every item after the position `newest`, (B, 1), of each row: (1, B, N)."""
        assert self.matrix is not None
        scores = self.matrix.new_zeros(len(items), self.counts.num_items)
        for lag in range(min(self.num_newest, items.shape[1] - 1)):
            item = items.gather(1, (newest - lag).clamp(min=0)).squeeze(1)
            scores += torch.where(newest >= lag, self.recency**lag, 0.0) * self.matrix[item]
        position = torch.arange(items.shape[1], device=items.device)
        return self._normalized(scores, items.gather(1, torch.minimum(position, newest))).unsqueeze(0)

    def _normalized(self, scores: Tensor, history: Tensor) -> Tensor:
        """Return the probabilities that belong to scores of the count: (.., N).

        history: (.., any number) the items of each history
        """
        total = scores.sum(dim=-1, keepdim=True)
        known = (1 - SMOOTHING) * (total > 0)
        found = scores * (known / total.clamp(min=1e-30)) + (1 - known) * self.popularity.float()
        if self.unseen:
            found = found.scatter(-1, history, 0.0)
        if self.temperature != 1:
            found = _raise(found / found.amax(dim=-1, keepdim=True).clamp(min=1e-30), 1 / self.temperature)
        return found / found.sum(dim=-1, keepdim=True).clamp(min=1e-30)

    def _draw_from_distributions(self, items: Tensor, newest: Tensor, chance: Tensor) -> Tensor:
        """Draw the targets after the positions `newest`: (B, G)."""
        every = chance.shape[1] == items.shape[1] - 1
        found = self._probabilities(items[:, :-1].T) if every else self._last_probabilities(items, newest)
        place = found.cumsum(dim=2)                                                                # (G, B, N)
        drawn = torch.searchsorted(place, (chance.T.unsqueeze(2) * place[:, :, -1:]).float().contiguous(), right=True)
        return drawn.squeeze(2).T.clamp(max=self.counts.num_items - 1)

    def _draw_entries(self, items: Tensor, newest: Tensor, popular: Tensor, chances: list[Tensor]) -> Tensor:
        """Draw an item of the history and then an entry of its row, without a distribution over all items: (B, G).

        popular: (B, G) bool, which targets come from the popularity
        chances: three random numbers from 0 to 1 for each target, (B, G) each
        """
        width = items.shape[1]
        mass = self._decay(width)[newest] * self._row_sums(items).unsqueeze(1)                     # (B, G, W)
        mass = mass.cumsum(dim=2)
        total = mass[:, :, -1]
        place = torch.searchsorted(mass, (chances[0] * total).unsqueeze(2), right=True).clamp(max=width - 1)
        by_popularity = torch.searchsorted(self.popularity.cumsum(0), chances[2]).clamp(max=len(self.popularity) - 1)
        if not len(self.counts.columns):
            return by_popularity  # no item follows another one
        followers = self._follower(items.gather(1, place.squeeze(2)).clamp(min=0), chances[1])
        return torch.where(popular | (total <= 0), by_popularity, followers)

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
            inside = (lag >= 0) & (lag < self.num_newest)
            self._decays[width] = torch.where(inside, self.recency ** lag.clamp(min=0).double(), 0.0)
        return self._decays[width]


def _raise(values: Tensor, exponent: float) -> Tensor:
    """Return `values` to the power of `exponent`, in place."""
    while exponent >= 2 and exponent % 2 == 0:  # a square takes a tenth of the time of a power
        values, exponent = values.square_(), exponent / 2
    return values if exponent == 1 else values.pow_(exponent)
