"""The event sequences of the users. A model reads them in parts, called windows."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.artifacts import DatasetFolder, Interactions, load_interactions, load_meta
from common.errors import DataError
from common.table_files import SPLITS
from recommendation.counting.teacher import UserEvents
from recommendation.models.abstract_model import PADDING, HeldOut, Windows

# E events, U users, B batch, W length of the longest window


class Spans(NamedTuple):
    """Ranges of events. Range i contains the events from `starts[i]` to `ends[i] - 1`."""

    starts: np.ndarray
    ends: np.ndarray


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

    def training_events(self) -> UserEvents:
        """Return which of all events are the training events of each user."""
        train, device = self.split == SPLITS.index("train"), self.device_items.device
        [starts] = np.nonzero(train & (self.first == np.arange(len(train))))
        ends = starts + np.add.reduceat(train.astype(np.int64), starts)
        return UserEvents(self.device_items, *(torch.from_numpy(part).to(device) for part in (starts, ends)))

    def validation_events(self) -> HeldOut:
        """Return the validation events that have a history, an argument of `AbstractRecommender.fit`."""
        positions, device = self.positions("valid"), self.device_items.device
        starts, ends = (torch.from_numpy(part).to(device) for part in (self.first[positions], positions))
        return HeldOut(self.device_items, starts, ends)

    @cached_property
    def has_repeats(self) -> bool:
        """Return whether a user has several training events with the same item."""
        train = self.split == SPLITS.index("train")
        pairs = np.sort(self.user[train] * (int(self.item.max()) + 1) + self.item[train])
        return bool((pairs[1:] == pairs[:-1]).any())

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
        return Windows(items, length, start)


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
