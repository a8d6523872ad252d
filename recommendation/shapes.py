"""The choice of few shapes for training batches, such that the batches have little padding."""

from typing import NamedTuple

import numpy as np

# D draws, M longest length, C candidates for the width of a batch

MAX_SHAPES = 16       # a GPU needs a captured step, and memory for it, for each shape
MAX_CANDIDATES = 256  # the search tries this number of different widths
MIN_FILLED = 0.85     # a batch should have at least this share of the wanted number of targets


class Shape(NamedTuple):
    """A shape of training batches, and the number of batches with this shape in each epoch."""

    rows: int
    width: int  # length of the longest window that fits
    num_batches: int

    @property
    def capacity(self) -> int:
        """The number of rows in all batches of this shape."""
        return self.rows * self.num_batches

    def split(self, windows: np.ndarray) -> list[np.ndarray]:
        """Distribute windows (at most `capacity`), which are sorted by length, evenly over the batches."""
        return [windows[batch::self.num_batches] for batch in range(self.num_batches)]


def choose_shapes(counts: np.ndarray, batch_size: int, one_target: bool) -> list[Shape]:
    """Return at most MAX_SHAPES shapes, sorted by width, that give little padding.

    counts: (D, M + 1) number of windows of each length in each of D random draws of the windows; all of them fit
    batch_size: wanted number of targets in a batch
    one_target: whether a window has one target, regardless of its length. All rows are then filled. Otherwise, a window
        of length l has l targets.
    """
    # With one target, batches of the largest width may have two different numbers of rows.
    choices = [_shapes(counts, widths, batch_size, one_target)
               for widths in _best_widths(counts.mean(axis=0), batch_size, one_target, MAX_SHAPES - one_target)]
    return min(choices, key=lambda shapes: sum(shape.capacity * shape.width for shape in shapes))


def _num_rows(wanted: float) -> int:
    """Round the number of rows of a batch to an integer that is not much smaller."""
    rows = max(round(wanted), 1)
    return rows if rows >= MIN_FILLED * wanted else rows + 1


def _best_widths(mean_counts: np.ndarray, batch_size: int, one_target: bool, max_widths: int) -> list[list[int]]:
    """For each number of widths from 1 to `max_widths`, return the widths with the least padding.

    mean_counts: (M + 1,) mean number of windows of each length
    """
    lengths = np.flatnonzero(mean_counts)
    candidates = lengths[np.unique(np.linspace(0, len(lengths) - 1, MAX_CANDIDATES).round().astype(int))]
    width = np.r_[0, candidates].astype(float)
    # Windows longer than width[i], up to width[j], get the width[j]: cost[i, j] is their padding (dynamic programming).
    windows, items = (np.r_[0, np.cumsum(of_length)[candidates]]
                      for of_length in (mean_counts, mean_counts * np.arange(len(mean_counts))))
    step = width[None, 1:] - width[:-1, None]                                                      # (C, C)
    cost = width[None, 1:] * (windows[None, 1:] - windows[:-1, None]) - (items[None, 1:] - items[:-1, None])
    # On average, half a batch of each width is moved to the next width, because it does not fill a batch.
    moved = np.array([0.0] + [(batch_size if one_target else batch_size / w) / 2 for w in width[1:-1]])
    cost = np.where(step > 0, cost + moved[:, None] * step, np.inf)
    best, before, found = cost[0], [], [[int(width[-1])]]
    for _ in range(min(max_widths, len(candidates)) - 1):
        total = best[:-1, None] + cost[1:]
        before.append(total.argmin(axis=0))
        best = total.min(axis=0)
        path = [len(candidates) - 1]
        for previous in reversed(before):
            path.append(int(previous[path[-1]]))
        found.append([int(candidates[i]) for i in reversed(path)])
    return found


def _shapes(counts: np.ndarray, widths: list[int], batch_size: int, one_target: bool) -> list[Shape]:
    """Return the shapes with these widths. The windows that do not fill a batch are moved to the next width.

    counts: (D, M + 1), as in `choose_shapes`
    """
    windows, mean_counts = counts.cumsum(axis=1), counts.mean(axis=0)
    num_targets = np.ones(len(mean_counts)) if one_target else np.arange(len(mean_counts))
    # If all windows are sorted by length, the first `mean_windows[l]` of them have `mean_targets[l]` targets.
    mean_windows, mean_targets = mean_counts.cumsum(), (mean_counts * num_targets).cumsum()
    shapes, used = list[Shape](), 0
    for width in widths:
        available = windows[:, width] - used                                                       # (D,)
        before, after = np.interp([used, used + available.min()], mean_windows, mean_targets)
        num_batches = int((after - before) / batch_size + 1e-6)
        filled = np.interp(before + num_batches * batch_size, mean_targets, mean_windows) - used
        rows = _num_rows(filled / num_batches) if num_batches else max(int(available.max()), 1)
        if width == widths[-1]:
            break
        num_batches = min(num_batches, int(available.min()) // rows)
        if num_batches:
            shapes.append(Shape(rows, width, num_batches))
            used += shapes[-1].capacity
    # Each batch must get a window. A draw with few long windows gives shorter windows to the last batches.
    most = int(windows[:, -1].min()) - sum(shape.num_batches for shape in shapes)
    if most == 0 and available.max() > 0:
        return _shapes(counts, widths[-1:], batch_size, one_target)
    return shapes + _last_shapes(int(available.max()), rows, widths[-1], most, one_target)


def _last_shapes(num_windows: int, rows: int, width: int, most: int, one_target: bool) -> list[Shape]:
    """Return the shapes of the largest width: at most `most` batches, with room for `num_windows` windows."""
    if not num_windows:
        return []
    num_batches = -(-num_windows // rows)
    if num_batches > 2 and num_windows < MIN_FILLED * num_batches * rows:
        num_batches -= 1  # slightly larger batches instead of batches with few targets
    num_batches = min(num_batches, most)
    fewest, more = divmod(num_windows, num_batches)
    if one_target:
        return [shape for shape in (Shape(fewest, width, num_batches - more), Shape(fewest + 1, width, more))
                if shape.num_batches]
    return [Shape(fewest + (more > 0), width, num_batches)]
