"""The event sequences of the users. A model reads them in parts, called windows."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.artifacts import DatasetFolder, Interactions, load_interactions, load_meta
from common.errors import DataError
from common.table_files import SPLITS
from common.training import derive_seed
from recommendation.models.abstract_model import PADDING, Windows

# E events, U users, B batch, W length of the longest window

SORT_AHEAD = 32  # windows are sorted by length in groups of this many batches


class Sequences:
    """All events of all users, one user after another.

    The history of an event consists of all earlier events of the same user.
    """

    def __init__(self, item: np.ndarray, user: np.ndarray, split: np.ndarray, device: torch.device | str = "cpu"):
        """Store the events, which must be sorted by user and then by time.

        item, user: (E,) item and user of each event
        split: (E,) split of each event, as an index into `SPLITS`
        """
        self.item, self.user, self.split = item, user, split
        new_user = np.r_[True, user[1:] != user[:-1]]
        self.first = np.maximum.accumulate(np.where(new_user, np.arange(len(user)), 0))  # (E,) user's first event
        self.device_items = torch.from_numpy(item).to(device)

    @classmethod
    def load(cls, folder: DatasetFolder, device: torch.device | str) -> "Sequences":
        """Load the sequences of a dataset. Raises DataError if the model could see test events during the training."""
        events = load_interactions(folder)
        split_name = load_meta(folder.interactions, folder.make_command).get("split_name")
        if problem := find_leak(events, split_name):
            raise DataError(folder.interactions, problem, "The model could see test events during the training",
                            f"{folder.make_command} --force")
        return cls(events.item, events.user, events.split, device)

    def positions(self, split: str) -> np.ndarray:
        """Return the indices of the events of a split that have a history."""
        of_split = self.split == SPLITS.index(split)
        return np.flatnonzero(of_split & (self.first < np.arange(len(self.item))))

    def num_without_history(self, split: str) -> int:
        """Return the number of events of a split that have no history. These events are not evaluated."""
        return int((self.split == SPLITS.index(split)).sum()) - len(self.positions(split))

    def training_sequences(self) -> list[Tensor]:
        """Return the training events as `[items, offsets]`, the arguments of `AbstractRecommender.fit`."""
        train = self.split == SPLITS.index("train")
        counts = np.bincount(self.user[train], minlength=int(self.user[-1]) + 1)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        device = self.device_items.device
        return [self.device_items[torch.from_numpy(train).to(device)], offsets.to(device)]

    def training_counts(self, num_items: int) -> np.ndarray:
        """Return the number of training events of each item, (num_items,)."""
        return np.bincount(self.item[self.split == SPLITS.index("train")], minlength=num_items)

    def histories(self, positions: np.ndarray, max_history: int) -> Windows:
        """For each event in `positions`, return the newest `max_history` items of its history."""
        return self.windows(np.maximum(self.first[positions], positions - max_history), positions)

    def windows(self, starts: np.ndarray, ends: np.ndarray) -> Windows:
        """Return the items of the events from `starts[i]` to `ends[i] - 1` in row i, with padding at the end."""
        device = self.device_items.device
        # Blocking copies would make the CPU wait for the GPU twice in each step.
        start, length = (torch.from_numpy(a).to(device, non_blocking=True) for a in (starts, ends - starts))
        offset = torch.arange(int((ends - starts).max()), device=device)
        index = (start.unsqueeze(1) + offset).clamp(max=len(self.item) - 1)
        items = self.device_items[index].masked_fill(offset >= length.unsqueeze(1), PADDING)
        return Windows(items, length)


def find_leak(events: Interactions, split_name: str | None) -> str | None:
    """Return an error message if the split breaks the rule of its name, else None.

    If the rule is broken, the model could see test events during the training. `load_interactions` has checked the
    order of the events.
    """
    train, valid, test = (events.split == SPLITS.index(name) for name in SPLITS)
    if split_name == "leave_one_out":
        for name, held_out in (("valid", valid), ("test", test)):
            if np.bincount(events.user[held_out], minlength=1).max() > 1:
                return (f"has a user with several events in the {name} split, but the dataset was made with "
                        "--split leave_one_out")
    held_out = valid | test
    if (split_name == "temporal" and train.any() and held_out.any()
            and events.timestamp[train].max() >= events.timestamp[held_out].min()):
        return ("has a training event at or after the time of a validation or test event, but the dataset was made "
                "with --split temporal")
    return None


class Spans(NamedTuple):
    """Ranges of events. Range i contains the events from `starts[i]` to `ends[i] - 1`."""

    starts: np.ndarray
    ends: np.ndarray


class TrainingBatches:
    """Batches of training windows. The windows of a batch have similar lengths.

    The same seed and epoch always give the same batches.
    """

    def __init__(self, sequences: Sequences, unit: str, batch_size: int, max_history: int, seed: int):
        """Compute the number of batches per epoch. Raises DataError if no training event has a history.

        unit: `target` or `sequence`, see `AbstractRecommender.training_unit`
        batch_size: number of targets in a batch
        """
        self.sequences, self.unit, self.max_history, self.seed = sequences, unit, max_history, seed
        self.targets = sequences.positions("train")
        if not len(self.targets):
            raise DataError("interactions.parquet", "has no training event with a history",
                            "No user has more than one training event",
                            "use a dataset with more events per user (a lower --min_user_interactions does not help)")
        self.num_batches = -(-len(self.targets) // batch_size)
        if unit == "sequence":
            # Every batch needs at least one segment, but the number of segments differs between epochs. So do not use
            # more batches than the smallest possible number of segments.
            num_targets = np.unique(sequences.first[self.targets], return_counts=True)[1]  # (U,) targets per user
            self.num_batches = min(self.num_batches, int((-(-num_targets // max_history)).sum()))
        self._epoch, self._batches = -1, list[Spans]()

    def get(self, epoch: int, index: int, rows: slice = slice(None)) -> Windows:
        """Return the windows of a batch. `rows` selects some of them (default: all)."""
        starts, ends = self.batch(epoch, index)
        return self.sequences.windows(starts[rows], ends[rows])

    def num_targets(self, epoch: int, index: int, rows: slice = slice(None)) -> int:
        """Return the number of targets in the windows that `get` returns for the same arguments."""
        starts, ends = self.batch(epoch, index)
        return len(starts[rows]) if self.unit == "target" else int((ends - starts - 1)[rows].sum())

    def batch(self, epoch: int, index: int) -> Spans:
        """Return the range of events of each window in a batch."""
        if epoch != self._epoch:
            rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
            self._epoch, self._batches = epoch, self._make_batches(rng)
        return self._batches[index]

    def _make_batches(self, rng: np.random.Generator) -> list[Spans]:
        starts, ends = self._single_targets() if self.unit == "target" else self._segments(rng)
        order = rng.permutation(len(starts))
        # Sort the windows by length within random groups of SORT_AHEAD batches. The windows of a batch then need little
        # padding. Every second group is sorted in descending order. Otherwise, a batch at the border of two groups
        # would contain the longest windows of one group and the shortest of the next. Padding would make this batch as
        # slow as ten batches.
        group = np.arange(len(order)) * self.num_batches // (len(order) * SORT_AHEAD)
        order = order[np.lexsort(((ends - starts)[order] * np.where(group % 2, -1, 1), group))]
        starts, ends = starts[order], ends[order]
        num_targets = np.cumsum(np.ones(len(starts)) if self.unit == "target" else ends - starts - 1)
        batch = np.minimum((num_targets - 1) * self.num_batches / num_targets[-1], self.num_batches - 1).astype(int)
        number = np.arange(self.num_batches + 1)
        borders = np.searchsorted(batch, number)
        # A segment with more targets than a batch would leave the next batch empty. Give every batch at least one
        # window.
        borders = np.minimum(np.maximum.accumulate(borders - number), len(starts) - self.num_batches) + number
        batches = [Spans(starts[a:b], ends[a:b]) for a, b in zip(borders[:-1], borders[1:], strict=True)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _single_targets(self) -> Spans:
        """Return one window per target: the `max_history` events before the target, and the target."""
        return Spans(np.maximum(self.sequences.first[self.targets], self.targets - self.max_history), self.targets + 1)

    def _segments(self, rng: np.random.Generator) -> Spans:
        """Split the training sequences at random points into segments, and return the segments as windows.

        A segment has at most `max_history` targets, and one item before the first target. Short sequences are split
        too, but less often. Without these splits, the model overfits (see benchmarks/README.md).
        """
        first = self.sequences.first[self.targets]
        new_user = np.r_[True, first[1:] != first[:-1]]
        user = np.cumsum(new_user) - 1
        shift = rng.integers(self.max_history, size=user[-1] + 1)[user]
        piece = (self.targets - first - 1 + shift) // self.max_history
        border = np.flatnonzero(new_user | np.r_[True, piece[1:] != piece[:-1]])
        return Spans(self.targets[border] - 1, self.targets[np.r_[border[1:], len(piece)] - 1] + 1)
