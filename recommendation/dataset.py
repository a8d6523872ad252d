"""Users' sequences, and the windows of them that a model trains on or is asked about."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.artifacts import SPLITS, DatasetFolder, Interactions, load_interactions, load_meta
from common.errors import DataError
from common.training import derive_seed
from recommendation.models.abstract_model import PADDING, Windows

# E events, U users, B batch, W longest window

SORT_AHEAD = 32  # batches whose windows are sorted by length together


class Sequences:
    """All events of all users, one after another; an event's history is what lies before it."""

    def __init__(self, item: np.ndarray, user: np.ndarray, split: np.ndarray, device: torch.device | str = "cpu"):
        """`user` sorted, and each user's events in their order; `split` indexes `SPLITS`."""
        self.item, self.user, self.split = item, user, split
        new_user = np.r_[True, user[1:] != user[:-1]]
        self.first = np.maximum.accumulate(np.where(new_user, np.arange(len(user)), 0))  # (E,) of the event's user
        self.device_items = torch.from_numpy(item).to(device)

    @classmethod
    def load(cls, folder: DatasetFolder, device: torch.device | str) -> "Sequences":
        """Raises DataError if what is tested could have been learned from: the splits would leak."""
        events = load_interactions(folder)
        split_name = load_meta(folder.interactions, folder.make_command).get("split_name")
        if problem := find_leak(events, split_name):
            raise DataError(folder.interactions, problem, "the test split would leak",
                            f"{folder.make_command} --force")
        return cls(events.item, events.user, events.split, device)

    def positions(self, split: str) -> np.ndarray:
        """The events of a split that have a history, as indices into all events."""
        of_split = self.split == SPLITS.index(split)
        return np.flatnonzero(of_split & (self.first < np.arange(len(self.item))))

    def num_without_history(self, split: str) -> int:
        """The events of a split that nothing lies before, about which no recommender is asked."""
        return int((self.split == SPLITS.index(split)).sum()) - len(self.positions(split))

    def training_sequences(self) -> list[Tensor]:
        """`[items, offsets]` of the training events alone, for models that fit in one call."""
        train = self.split == SPLITS.index("train")
        counts = np.bincount(self.user[train], minlength=int(self.user[-1]) + 1)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        device = self.device_items.device
        return [self.device_items[torch.from_numpy(train).to(device)], offsets.to(device)]

    def training_counts(self, num_items: int) -> np.ndarray:
        """(N,) training events of each item."""
        return np.bincount(self.item[self.split == SPLITS.index("train")], minlength=num_items)

    def histories(self, positions: np.ndarray, max_history: int) -> Windows:
        """The newest `max_history` items before each of the events."""
        return self.windows(np.maximum(self.first[positions], positions - max_history), positions)

    def windows(self, starts: np.ndarray, ends: np.ndarray) -> Windows:
        """Events `starts[i]` up to, not including, `ends[i]`, as rows."""
        device = self.device_items.device
        # Else a GPU's queue would be waited for twice a step.
        start, length = (torch.from_numpy(a).to(device, non_blocking=True) for a in (starts, ends - starts))
        offset = torch.arange(int((ends - starts).max()), device=device)
        index = (start.unsqueeze(1) + offset).clamp(max=len(self.item) - 1)
        items = self.device_items[index].masked_fill(offset >= length.unsqueeze(1), PADDING)
        return Windows(items, length)


def find_leak(events: Interactions, split_name: str | None) -> str | None:
    """What breaks the promise of the split, in words, or None."""
    train, valid, test = (events.split == SPLITS.index(name) for name in SPLITS)
    within = events.user[1:] == events.user[:-1]
    if (events.user[1:] < events.user[:-1]).any() or (events.timestamp[1:] < events.timestamp[:-1])[within].any():
        return "is not sorted by user and time"
    if (events.split[1:] < events.split[:-1])[within].any():
        return "has a training event behind a test event of the same user"
    if split_name == "leave_one_out":
        for name, held_out in (("valid", valid), ("test", test)):
            if np.bincount(events.user[held_out], minlength=1).max() > 1:
                return f"has several {name} events of one user, and names its split leave_one_out"
    held_out = valid | test
    if (split_name == "temporal" and train.any() and held_out.any()
            and events.timestamp[train].max() >= events.timestamp[held_out].min()):
        return "has a training event that is no earlier than a held-out one, and names its split temporal"
    return None


class Spans(NamedTuple):
    """Events `starts[i]` up to, not including, `ends[i]`."""

    starts: np.ndarray
    ends: np.ndarray


class TrainingBatches:
    """The windows of an epoch in batches of like length, a function of (seed, epoch) alone."""

    def __init__(self, sequences: Sequences, unit: str, batch_size: int, max_history: int, seed: int):
        """`unit` is `target` or `sequence`, as `AbstractRecommender.training_unit` says; sizes in targets."""
        self.sequences, self.unit, self.max_history, self.seed = sequences, unit, max_history, seed
        self.targets = sequences.positions("train")
        if not len(self.targets):
            raise DataError("interactions.parquet", "has no training event with a history", "every user has one event",
                            "a lower --min_user_interactions keeps no more of them; use a larger data set")
        self.num_batches = -(-len(self.targets) // batch_size)
        if unit == "sequence":  # a stretch is not divided, so there are no more batches than the fewest stretches
            num_targets = np.unique(sequences.first[self.targets], return_counts=True)[1]  # (U,) of each user
            self.num_batches = min(self.num_batches, int((-(-num_targets // max_history)).sum()))
        self._epoch, self._batches = -1, list[Spans]()

    def get(self, epoch: int, index: int, rows: slice = slice(None)) -> Windows:
        """The windows of a batch, or some of them."""
        starts, ends = self.batch(epoch, index)
        return self.sequences.windows(starts[rows], ends[rows])

    def num_targets(self, epoch: int, index: int, rows: slice = slice(None)) -> int:
        """What the loss of these windows is a mean over."""
        starts, ends = self.batch(epoch, index)
        return len(starts[rows]) if self.unit == "target" else int((ends - starts - 1)[rows].sum())

    def batch(self, epoch: int, index: int) -> Spans:
        if epoch != self._epoch:
            rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
            self._epoch, self._batches = epoch, self._cut(rng)
        return self._batches[index]

    def _cut(self, rng: np.random.Generator) -> list[Spans]:
        starts, ends = self._single_targets() if self.unit == "target" else self._stretches(rng)
        order = rng.permutation(len(starts))
        # Sorting a few batches' worth at a time brings like lengths together and keeps chance in charge. Every other
        # time the longest come first: the batch where two sorted runs meet would else pad one's shortest windows to
        # the other's longest, and cost as much as ten batches.
        run = np.arange(len(order)) * self.num_batches // (len(order) * SORT_AHEAD)
        order = order[np.lexsort(((ends - starts)[order] * np.where(run % 2, -1, 1), run))]
        starts, ends = starts[order], ends[order]
        num_targets = np.cumsum(np.ones(len(starts)) if self.unit == "target" else ends - starts - 1)
        batch = np.minimum((num_targets - 1) * self.num_batches / num_targets[-1], self.num_batches - 1).astype(int)
        number = np.arange(self.num_batches + 1)
        borders = np.searchsorted(batch, number)
        # A stretch longer than a batch would leave an empty one: every border moves on by at least one.
        borders = np.minimum(np.maximum.accumulate(borders - number), len(starts) - self.num_batches) + number
        batches = [Spans(starts[a:b], ends[a:b]) for a, b in zip(borders[:-1], borders[1:], strict=True)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _single_targets(self) -> Spans:
        """Each target behind its history."""
        return Spans(np.maximum(self.sequences.first[self.targets], self.targets - self.max_history), self.targets + 1)

    def _stretches(self, rng: np.random.Generator) -> Spans:
        """Stretches of at most `max_history` targets and the item before them, cut at other places each epoch.

        A user who would fit is cut as well, the seldomer the fewer targets they have: learned from whole in every
        epoch, models have the events by heart sooner and validate worse (benchmarks/README.md has the figures).
        """
        first = self.sequences.first[self.targets]
        new_user = np.r_[True, first[1:] != first[:-1]]
        user = np.cumsum(new_user) - 1
        shift = rng.integers(self.max_history, size=user[-1] + 1)[user]
        piece = (self.targets - first - 1 + shift) // self.max_history
        border = np.flatnonzero(new_user | np.r_[True, piece[1:] != piece[:-1]])
        return Spans(self.targets[border] - 1, self.targets[np.r_[border[1:], len(piece)] - 1] + 1)
