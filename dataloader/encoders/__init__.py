"""What turns texts (or what stands for images) into vectors, and the one contract that the steps know of it.

An encoder gives a text the same vector whatever is encoded beside it, so that vectors can be kept by their text. It
imports nothing heavy before it is asked to encode.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    unit: str        # what it encodes, in messages: texts
    flag: str        # by which the user chose it
    identity: dict   # what determines a vector beside its text, as JSON holds it; no secrets
    shard_size: int  # texts that are handed over, and written to the disk, together

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """float32 (len(texts), D), in the order of the texts; `done(n)` after every n of them.

        Raises BatchFailed, or a user error if the fault is not in the texts.
        """
        ...

    def close(self) -> None:
        """Give back processes and connections."""
        ...


class BatchFailed(Exception):
    """Some of the texts could not be encoded: `rows`, by their place in the list that was handed over."""

    def __init__(self, rows: range, why: str, out_of_memory: bool = False):
        super().__init__(why)
        self.rows, self.why, self.out_of_memory = rows, why, out_of_memory
