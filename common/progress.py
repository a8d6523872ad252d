"""Progress and remaining time: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time

from tqdm import tqdm

from common.distributed import is_main
from common.output import flush, show

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A display of the number of finished units, out of `total`, and of the last values passed to `update`.

    With `kept=False`, the bar is erased at the end. Use this for work that is repeated many times.
    """

    def __init__(self, description: str, total: int, unit: str = "it", initial: int = 0, kept: bool = True):
        self.description, self.total, self.unit = description, total, unit
        self.done = self.initial = initial
        self.start = time.monotonic()
        self.next_line = self.start + SECONDS_BETWEEN_LINES
        self.values_text = ""
        self.bar = None
        self.shown = is_main()  # only the first of several processes shows progress
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(desc=description, total=total, unit=unit, initial=initial, dynamic_ncols=True, leave=kept,
                            unit_scale=unit == "B")

    def update(self, count: int = 1, **values: object) -> None:
        self.done += count
        if values:
            self.values_text = ", ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
                                         for name, value in values.items())
        if self.bar is not None:
            if values:
                self.bar.set_postfix_str(self.values_text, refresh=False)
            self.bar.update(count)
        elif self.shown and (now := time.monotonic()) >= self.next_line:
            self.next_line = now + SECONDS_BETWEEN_LINES
            self._line(now)

    def _line(self, now: float) -> None:
        rate = (self.done - self.initial) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        eta = f"{int(left) // 60}:{int(left) % 60:02d}" if left != float("inf") else "?"
        tail = f", {self.values_text}" if self.values_text else ""
        counts, unit = f"{self.done}/{self.total}", self.unit
        if unit == "B":
            counts, rate, unit = f"{self.done / 1e6:.1f}/{self.total / 1e6:.1f}", rate / 1e6, "MB"
        show(f"{self.description}: {counts} {unit} "
              f"({100 * self.done / max(self.total, 1):.0f} %), {rate:.1f} {unit}/s, ETA {eta}{tail}", sys.stderr)
        flush(sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.bar is not None:
            self.bar.close()
        elif self.shown and time.monotonic() - self.start >= SECONDS_BETWEEN_LINES and exc[0] is None:
            self._line(time.monotonic())
