"""The training batches of an epoch. All batches of a run have one of a few shapes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.data_parallel import Shard
from common.device import send
from common.errors import DataError
from common.training import derive_seed
from recommendation.dataset import Sequences, Spans
from recommendation.models.abstract_model import PADDING, Windows
from recommendation.shapes import Shape, choose_shapes

# R rows of all batches of an epoch, B batches

NUM_DRAWS = 4, 64          # smallest and largest number of random segmentations from which the shapes are chosen
DRAWN_TARGETS = 2_000_000  # in between, this number of targets in all segmentations together
MAX_REDRAWS = 50           # attempts to find a segmentation that fits into the batches
BLOCK_CELLS = 1 << 20      # the device builds blocks of batches, each with about this number of items


class Epoch(NamedTuple):
    """The batches of one epoch. The rows of batch b have the indices from `first_row[b]` to `first_row[b + 1] - 1`."""

    starts: np.ndarray       # (R,) first event of each window
    lengths: np.ndarray      # (R,) number of events of each window; 0 for the empty rows at the end of a batch
    first_row: np.ndarray    # (B + 1,)
    num_windows: np.ndarray  # (B,) number of rows that are not empty
    width: np.ndarray        # (B,) number of items in a row
    first_item: np.ndarray   # (B + 1,) number of items, with padding, in the batches before


class Block(NamedTuple):
    """The items of a few consecutive batches, on the device."""

    batches: range
    items: Tensor


class TrainingBatches:
    """Batches of training windows. The windows of a batch have similar lengths.

    The same seed and epoch always give the same batches. Each epoch has the same number of batches of each shape. The
    windows are padded with PADDING, and a batch may end with empty rows. With the unit `target`, no row is empty.
    """

    def __init__(self, sequences: Sequences, unit: str, batch_size: int, max_history: int, seed: int):
        """Choose the shapes of the batches. Raises DataError if no training event has a history.

        unit: `target` or `sequence`, see `AbstractRecommender.training_unit`
        batch_size: number of targets in a batch
        """
        self.sequences, self.unit, self.max_history, self.seed = sequences, unit, max_history, seed
        self.targets = sequences.positions("train")
        if not len(self.targets):
            raise DataError("interactions.parquet", "has no training event with a history",
                            "No user has more than one training event",
                            "use a dataset with more events per user (a lower --min_user_interactions does not help)")
        num_draws = int(np.clip(DRAWN_TARGETS // len(self.targets), *NUM_DRAWS)) if unit == "sequence" else 1
        draws = [self._windows(np.random.default_rng(draw)) for draw in range(num_draws)]
        lengths = [ends - starts - 1 for starts, ends in draws]
        longest = max(map(np.max, lengths))
        self.shapes = choose_shapes(np.array([np.bincount(of_draw, minlength=longest + 1) for of_draw in lengths]),
                                    batch_size, unit == "target")
        self.num_batches = sum(shape.num_batches for shape in self.shapes)
        self._number, self._block, self._rows = -1, Block(range(0), torch.empty(0)), torch.empty(0)
        self._epoch: Epoch | None = None

    def get(self, epoch: int, index: int, part: Shard) -> Windows:
        """Return the windows of a batch, or only those of a shard. A shard has no empty rows."""
        content = self._load(epoch)
        first, last = content.first_row[index:index + 2]
        if part.num_shards > 1:
            rows = np.arange(first, first + content.num_windows[index])[part.rows]
            return self.sequences.windows(content.starts[rows], content.starts[rows] + content.lengths[rows])
        if index not in self._block.batches:
            self._block = self._build(content, index)
        begin = content.first_item[index] - content.first_item[self._block.batches[0]]
        items = self._block.items[begin:begin + (last - first) * content.width[index]]
        return Windows(items.view(last - first, -1), self._rows[1, first:last], self._rows[0, first:last])

    def num_windows(self, epoch: int, index: int) -> int:
        """Return the number of rows in a batch that are not empty."""
        return int(self._load(epoch).num_windows[index])

    def num_targets(self, epoch: int, index: int, rows: slice = slice(None)) -> int:
        """Return the number of targets in the windows of a batch. `rows` selects some of them (default: all)."""
        lengths = self.lengths(epoch, index)[rows]
        return len(lengths) if self.unit == "target" else int((lengths - 1).sum())

    def lengths(self, epoch: int, index: int) -> np.ndarray:
        """Return the number of events of each window in a batch, without the empty rows."""
        return self._load(epoch).lengths[self._windows_of(epoch, index)]

    def users(self, epoch: int, index: int) -> list[int]:
        """Return the user of each window in a batch."""
        return self.sequences.user[self._load(epoch).starts[self._windows_of(epoch, index)]].tolist()

    def _windows_of(self, epoch: int, index: int) -> slice:
        content = self._load(epoch)
        return slice(content.first_row[index], content.first_row[index] + content.num_windows[index])

    def _load(self, epoch: int) -> Epoch:
        """Return the batches of an epoch, and copy their rows to the device."""
        if epoch != self._number or self._epoch is None:
            content = self._make_epoch(np.random.default_rng(derive_seed(self.seed, "order", epoch)))
            width = np.repeat(content.width, np.diff(content.first_row))
            rows = np.stack([content.starts, content.lengths, width, np.cumsum(width) - width])
            self._rows = send(torch.from_numpy(rows), self.sequences.device_items.device)
            self._number, self._epoch, self._block = epoch, content, Block(range(0), torch.empty(0))
        return self._epoch

    def _build(self, content: Epoch, index: int) -> Block:
        """Build the items of some batches on the device, beginning with batch `index`."""
        # On a GPU, a few kernels for many batches take much less time than a few kernels for each batch.
        first_item = content.first_item
        last = max(int(np.searchsorted(first_item, first_item[index] + BLOCK_CELLS, side="right")) - 1, index + 1)
        part = slice(content.first_row[index], content.first_row[last])
        start, length, width, begin = self._rows[:, part]
        num_items = int(first_item[last] - first_item[index])
        row = torch.repeat_interleave(width, output_size=num_items)
        offset = torch.arange(first_item[index], first_item[last], device=row.device) - begin[row]
        events = (start[row] + offset).clamp_(max=len(self.sequences.item) - 1)
        items = self.sequences.device_items[events].masked_fill_(offset >= length[row], PADDING)
        return Block(range(index, last), items)

    def _make_epoch(self, rng: np.random.Generator) -> Epoch:
        for _ in range(MAX_REDRAWS):
            content = self._arrange(self._windows(rng), rng)
            if content is not None:
                return content
        # The shapes have been chosen such that this segmentation fits.
        content = self._arrange(self._windows(np.random.default_rng(0)), rng)
        assert content is not None
        return content

    def _arrange(self, windows: Spans, rng: np.random.Generator) -> Epoch | None:
        """Distribute windows over the batches in random order. Return None if they do not fit."""
        starts, lengths = windows.starts, windows.ends - windows.starts
        order = rng.permutation(len(starts))
        order = order[np.argsort(lengths[order], kind="stable")]
        # The shapes are sorted by width. Each shape takes the shortest remaining windows, as many as fit.
        ordered, parts, begin = lengths[order], [], 0
        for number, shape in enumerate(self.shapes):
            fitting = int(np.searchsorted(ordered, shape.width + 1, side="right"))
            others = sum(other.num_batches for other in self.shapes[number + 1:])  # each batch needs a window
            end = min(begin + shape.capacity, fitting, len(order) - others)
            if end - begin < shape.num_batches:
                return None
            parts += shape.split(order[begin:end])
            begin = end
        if begin < len(order):
            return None
        shapes = [shape for shape in self.shapes for _ in range(shape.num_batches)]
        return _joined([(shapes[i], starts[parts[i]], lengths[parts[i]]) for i in rng.permutation(len(parts))])

    def _windows(self, rng: np.random.Generator) -> Spans:
        return self._single_targets() if self.unit == "target" else self._segments(rng)

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


def _joined(batches: list[tuple[Shape, np.ndarray, np.ndarray]]) -> Epoch:
    """Return the epoch with these batches. Each batch has a shape, and the starts and lengths of its windows."""
    rows = np.array([shape.rows for shape, _, _ in batches])
    width = np.array([shape.width + 1 for shape, _, _ in batches])
    num_windows = np.array([len(starts) for _, starts, _ in batches])
    first_row = np.r_[0, np.cumsum(rows)]
    place = np.concatenate([np.arange(first, first + count)
                            for first, count in zip(first_row, num_windows, strict=False)])
    starts, lengths = np.zeros((2, first_row[-1]), dtype=np.int64)
    starts[place] = np.concatenate([of_batch for _, of_batch, _ in batches])
    lengths[place] = np.concatenate([of_batch for _, _, of_batch in batches])
    return Epoch(starts, lengths, first_row, num_windows, width, np.r_[0, np.cumsum(rows * width)])
