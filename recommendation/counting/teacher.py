"""A teacher: targets from a count of the training events, for models that are trained by gradient descent."""

from typing import NamedTuple

import torch
from torch import Tensor

from common.progress import Progress
from recommendation.counting.counts import SMOOTHING, Counts
from recommendation.decoding.top_k import PADDING

# E events, U users, A users of a block, N items, K items of a list

NUM_LIKELY = 64             # items in a list, if all lists fit into LIST_BYTES
LIST_BYTES = 2**31
BLOCK_SCORES = 4_000_000    # scores that are computed at a time


class UserEvents(NamedTuple):
    """The training events of all users. User u has the events from `starts[u]` to `ends[u] - 1`."""

    items: Tensor   # (E,) item of each event; there may be other events between those of two users
    starts: Tensor  # (U,)
    ends: Tensor    # (U,)


class CountTeacher:
    """Replaces targets by items that follow the same history in a count.

    The target of a position is the next item with probability `1 - weight`. Otherwise, it is drawn from the most likely
    items of the count after the same history. Their probabilities (see `Counts.log_probabilities`) are raised to the
    power of 1 / `temperature`, and their sum is 1. The lists of all events are computed once, so a step only reads
    them. The count knows rare items; a model that learns from it needs fewer events.
    """

    def __init__(self, counts: Counts, events: UserEvents, weight: float, unseen: bool, temperature: float):
        """unseen: whether to draw no item of the history
        temperature: below 1, likely items become more likely
        """
        self.num_calls = 0  # a model that ignores its teacher never calls it
        self.likely, self.shares = _likely_items(counts, events, unseen, temperature)      # (E, K) each
        self.shares *= weight

    def distributions(self, events: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution of the target at each event, as items and their probabilities.

        events, targets: (..) indices of the training events, and their items; with PADDING, the result has no meaning
        The results have the shape (.., K + 1). The first item is the target itself.
        """
        self.num_calls += 1
        events = events.clamp(max=len(self.likely) - 1)
        items, shares = self.likely[events].long(), self.shares[events]
        own = 1 - shares.sum(dim=-1, keepdim=True)
        return torch.cat([targets.clamp(min=0).unsqueeze(-1), items], dim=-1), torch.cat([own, shares], dim=-1)

    def draw(self, events: Tensor, targets: Tensor) -> Tensor:
        """Replace some of the targets by items from their distributions. The arguments are those of `distributions`."""
        return draw(*self.distributions(events, targets), targets)


def draw(items: Tensor, shares: Tensor, targets: Tensor) -> Tensor:
    """Draw an item from each distribution: (.., K) items and their probabilities -> (..). PADDING stays a target."""
    place = shares.cumsum(dim=-1)
    chance = torch.rand_like(place[..., :1]) * place[..., -1:]
    chosen = torch.searchsorted(place, chance, right=True).clamp(max=items.shape[-1] - 1)
    return torch.where(targets == PADDING, targets, items.gather(-1, chosen).squeeze(-1))


def _likely_items(counts: Counts, events: UserEvents, unseen: bool, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the most likely items of each event after its history, and their shares: (E, K) int32 and float32.

    Other events, and the first events of the users, have the shares 0.
    """
    num_likely = min(NUM_LIKELY, max(LIST_BYTES // (8 * len(events.items)), 1), counts.num_items)
    likely = torch.zeros(len(events.items), num_likely, dtype=torch.int32, device=events.items.device)
    shares = torch.zeros(likely.shape, device=likely.device)
    lengths, order = (events.ends - events.starts).sort(descending=True, stable=True)
    num_users, scores = max(BLOCK_SCORES // counts.num_items, 1), _Scores(counts, unseen)
    with Progress("teacher", int((lengths - 1).clamp(min=0).sum()), "events", kept=False) as progress:
        for starts, of_block in zip(events.starts[order].split(num_users), lengths.split(num_users), strict=True):
            scores.clear(len(starts))
            # The users of a block have descending lengths, so the first ones still have events.
            num_active = (of_block.unsqueeze(0) > torch.arange(int(of_block[0]), device=starts.device).unsqueeze(1))
            for place, active in enumerate(num_active.sum(dim=1).tolist()[1:], start=1):
                at = starts[:active] + place
                scores.add(events.items, at - 1, place - 1)
                values, items = scores.probabilities().topk(num_likely, dim=1)
                values = (values / values[:, :1].clamp(min=1e-30)) ** (1 / temperature)
                likely[at] = items.int()
                shares[at] = values / values.sum(dim=1, keepdim=True).clamp(min=1e-30)
                progress.update(active)
    return likely, shares


class _Scores:
    """The scores of all items for the histories of some users, event by event. They are those of `Counts.scores`."""

    def __init__(self, counts: Counts, unseen: bool):
        self.counts, self.num_newest, self.recency = counts, int(counts.num_newest), float(counts.recency)
        self.row_sums = counts.row_sums().float()                                              # (N,)
        popularity = (counts.popularity + 1).float()
        self.popularity = popularity / popularity.sum()
        self.unseen = unseen
        self.clear(0)

    def clear(self, num_users: int) -> None:
        """Begin with users without events."""
        device = self.row_sums.device
        self.scores = torch.zeros(num_users, self.counts.num_items, device=device)             # (A, N)
        self.seen = torch.zeros(self.scores.shape if self.unseen else 0, dtype=torch.bool, device=device)
        self.totals = torch.zeros(num_users, device=device)                                    # (A,)

    def add(self, items: Tensor, at: Tensor, place: int) -> None:
        """Add the next event of the first users.

        at: indices of the events
        place: number of earlier events of these users
        """
        num_users, newest = len(at), items[at]
        self.scores = self.scores[:num_users].mul_(self.recency)
        self._add_rows(newest, 1.0)
        if place >= self.num_newest:
            self._add_rows(items[at - self.num_newest], -self.recency**self.num_newest)
        lag = torch.arange(min(place + 1, self.num_newest), device=at.device)
        # The sum of the scores would not be exactly 0 after events are subtracted.
        self.totals = (self.row_sums[items[at.unsqueeze(1) - lag]] * self.recency**lag).sum(dim=1)
        if self.unseen:
            self.seen = self.seen[:num_users].scatter_(1, newest.unsqueeze(1), True)

    def _add_rows(self, items: Tensor, factor: float) -> None:
        user, entry = self.counts.entries(items)
        place = user * self.counts.num_items + self.counts.columns[entry]
        self.scores.view(-1).scatter_add_(0, place, self.counts.values[entry] * factor)

    def probabilities(self) -> Tensor:
        """Return the probabilities of all items, (A, N); those of seen items are 0, if only unseen items are drawn."""
        known = (1 - SMOOTHING) * (self.totals > 0)
        factor = (known / self.totals.clamp(min=1e-30)).unsqueeze(1)
        found = torch.addcmul((1 - known).unsqueeze(1) * self.popularity, self.scores.clamp(min=0), factor)
        return found.masked_fill_(self.seen, 0.0) if self.unseen else found
