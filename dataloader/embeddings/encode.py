"""Encode all texts or images of a dataset. Cached vectors are reused; all other texts are encoded shard by shard.

The processes of torchrun share the shards.
"""

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from common.distributed import all_gather_rows, is_main, rank, world_size
from common.errors import DataError, ResourceError
from common.progress import Progress
from dataloader.embeddings.cache import VectorCache, text_keys
from dataloader.embeddings.processes import same_error

log = logging.getLogger(__name__)

NUM_NAMED = 10  # raw ids named in an error message

# N items, U distinct texts, D dimensions


class Encoder(Protocol):
    """An encoder of texts as vectors. The vector of a text does not depend on the other texts.

    An encoder of images gets the sha256 of each image file instead of a text.
    """

    unit: str        # "texts" or "images", for messages
    flag: str        # the flag that selects the model, for messages
    identity: dict   # all settings that affect the vectors, as JSON values; contains no secrets
    shard_size: int  # texts per call of `encode` and per shard of the cache

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """Encode texts: float32 (len(texts), D). Calls `done(n)` whenever n more texts are encoded.

        Raises BatchFailed if some of the texts cannot be encoded. Raises HalfPrecisionOverflow if the values are too
        large for the precision of the model.
        """

    def close(self) -> None:
        """Release processes and connections."""


class BatchFailed(Exception):
    """Some texts could not be encoded. `rows` are their positions in the list that was passed to `encode`."""

    def __init__(self, rows: range, why: str, out_of_memory: bool = False):
        super().__init__(why)
        self.rows, self.why, self.out_of_memory = rows, why, out_of_memory


class HalfPrecisionOverflow(Exception):
    """The model computed values that are too large for half precision."""


class Texts(NamedTuple):
    """The texts and raw ids of all items, and the path of the embedding (for error messages)."""

    texts: np.ndarray    # object (N,), of str
    raw_ids: np.ndarray  # object (N,)
    path: Path


def encode_once(encoder: Encoder, items: Texts, data_root: Path, fresh: bool) -> tuple[np.ndarray | None, dict]:
    """Encode all items with `encode_all`, close the encoder, and return the vectors and the encoder's identity."""
    with closing(encoder):
        return encode_all(encoder, items, VectorCache(data_root, encoder.identity), fresh), encoder.identity


def encode_all(encoder: Encoder, items: Texts, cache: VectorCache, fresh: bool = False) -> np.ndarray | None:
    """Return the vectors of all items: float32 (N, D). Equal texts are encoded only once.

    Cached vectors are reused, unless `fresh` is true. If a run is killed, the next run encodes the remaining texts.
    The vectors are bit-identical to those of an uninterrupted run.

    If there are several processes, they share the missing shards. Only the first process returns the vectors; the
    others return None. The vectors do not depend on the number of processes.

    Raises DataError if a text gets no usable vector; the error names the raw ids of the items. Raises ResourceError if
    there is not enough memory to encode a single text.
    """
    work, newest = _Work(encoder, items, cache), cache.newest()
    with same_error():
        if is_main() and not fresh:
            for shard in cache.shards():
                work.take(*shard)
    work.copy_state_of_first()
    shards = work.missing_shards()
    num_texts, num_missing = len(work.keys), sum(map(len, shards))
    log.info("embed: %d distinct %s, %d to encode; the others are cached in %s", num_texts, encoder.unit, num_missing,
             cache.folder)
    with Progress(f"embed {encoder.unit}", num_texts, encoder.unit, num_texts - num_missing) as progress:
        for start in range(0, len(shards), world_size()):
            # One shard per process. Then the processes wait for each other: if one of them fails, all stop.
            together = shards[start:start + world_size()]
            with same_error(HalfPrecisionOverflow):
                if rank() < len(together):
                    work.encode(together[rank()], progress.update)
            progress.update(sum(map(len, together[1:])))  # the first process shows the progress of all
    with same_error(HalfPrecisionOverflow):
        if not is_main():
            return None
        if world_size() > 1:
            work.collect(shards, newest)
        if fresh:
            cache.drop_superseded(newest, work.keys)
        return work.vectors_of_all_items()


class _Work:
    """The distinct texts, and the vectors that have been read or encoded so far.

    keys: the keys of the distinct texts, sorted, (U,)
    rows: for each distinct text, the index of the first item with this text, (U,). The row of `vectors` with this index
        contains the vector of the text.
    there: whether each distinct text has a vector, bool (U,)

    Only the first of several processes has `vectors`.
    """

    def __init__(self, encoder: Encoder, items: Texts, cache: VectorCache):
        self.encoder, self.items, self.cache = encoder, items, cache
        # np.unique sorts the texts by key. This also fixes the order of texts of equal length.
        self.keys, self.rows, self.text_of = np.unique(text_keys(items.texts), return_index=True, return_inverse=True)
        self.there = np.zeros(len(self.keys), dtype=bool)
        self.vectors: np.ndarray | None = None  # float32 (N, D); None while D is unknown
        self.dim = 0                            # D; 0 while it is unknown

    def take(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Copy the vectors of those texts that are needed and have no vector yet."""
        if self.vectors is None:
            self.dim = vectors.shape[1]
            self.vectors = np.empty((len(self.items.texts), self.dim), dtype=np.float32)
        if vectors.shape[1] != self.dim:  # an API may later use the same name for another model
            log.warning("embed: a cached shard with %d dimensions instead of %d was skipped",
                        vectors.shape[1], self.dim)
            return
        position = np.searchsorted(self.keys, keys) % len(self.keys)
        wanted = (self.keys[position] == keys) & ~self.there[position]
        self.vectors[self.rows[position[wanted]]] = vectors[wanted]
        self.there[position[wanted]] = True

    def copy_state_of_first(self) -> None:
        """Copy `there` and `dim` of the first process, which has read the cache, to the others."""
        # If every process read the cache, they might find different shards, for example while another command writes.
        dim = np.array([self.dim])
        all_gather_rows(self.there.view(np.uint8), dim)
        self.dim = int(dim[0])

    def missing_shards(self) -> list[np.ndarray]:
        """Return the texts without a vector as shards. A shard is an array of positions in `keys`."""
        missing, size = np.flatnonzero(~self.there), self.encoder.shard_size
        texts = (self.items.texts[row] for row in self.rows[missing])
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(missing))
        # Long texts first, to reduce padding. The order is fixed, so a continued run encodes the same shards.
        missing = missing[np.argsort(-lengths, kind="stable")]
        return [missing[start:start + size] for start in range(0, len(missing), size)]

    def encode(self, shard: np.ndarray, done: Callable[[int], None]) -> None:
        """Encode the texts of a shard, and write their vectors to the cache."""
        vectors = _encode_rows(self.encoder, self.items, self.rows[shard], done)
        if self.dim not in (0, vectors.shape[1]):
            unit, folder = self.encoder.unit, self.cache.folder
            raise DataError(self.items.path, f"the model returned vectors with {vectors.shape[1]} dimensions, expected "
                            f"{self.dim}", f"The cached vectors of {unit} in {folder} have {self.dim} dimensions",
                            f"use --force to encode all {unit} again")
        self.cache.write(self.keys[shard], vectors)
        if is_main():
            self.take(self.keys[shard], vectors)

    def collect(self, shards: list[np.ndarray], newest: int) -> None:
        """Read the shards that the other processes have written. `newest` is the number of the last older shard."""
        for written in self.cache.shards(after=newest):
            self.take(*written)
        for shard in shards:
            if not self.there[shard].all():  # the file was deleted or damaged in the meantime
                self.encode(shard, lambda count: None)

    def vectors_of_all_items(self) -> np.ndarray:
        """Return the vectors (N, D). If an item has the same text as an earlier item, it gets a copy of that vector."""
        first = self.rows[self.text_of]
        again = np.flatnonzero(first != np.arange(len(first)))
        self.vectors[again] = self.vectors[first[again]]
        return self.vectors


def _encode_rows(encoder: Encoder, items: Texts, rows: np.ndarray, done: Callable[[int], None]) -> np.ndarray:
    """Encode the texts of these rows: float32 (len(rows), D).

    Raises DataError if the encoder fails, or if a vector is all zero or not finite. Raises ResourceError if there is
    not enough memory.
    """
    fix = f"use another {encoder.flag}, or check the {encoder.unit} of these items"
    try:
        vectors = encoder.encode(items.texts[rows].tolist(), done)
    except BatchFailed as failed:
        ids = named(items.raw_ids[np.sort(rows[failed.rows])])
        if failed.out_of_memory:
            raise ResourceError(items.path, f"not enough memory to encode {encoder.unit}, even one at a time",
                                f"Items: {ids}", f"use a smaller {encoder.flag}, or another --device") from failed
        raise DataError(items.path, f"the model failed on {len(failed.rows)} {encoder.unit}",
                        f"{failed.why}. Items: {ids}", fix) from failed
    bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
    if bad.any():
        raise DataError(items.path, f"the vectors of {bad.sum()} {encoder.unit} are unusable (not finite, or all zero)",
                        f"Items: {named(items.raw_ids[np.sort(rows[bad])])}", fix)
    return vectors


def named(raw_ids: np.ndarray) -> str:
    """Return a list of raw ids as text for a message: the first NUM_NAMED ids, and the number of the other ids."""
    more = len(raw_ids) - NUM_NAMED
    return ", ".join(raw_ids[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
