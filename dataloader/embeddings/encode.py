"""Encode all texts or images of a dataset. Cached vectors are reused; all other texts are encoded shard by shard."""

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from common.errors import DataError, ResourceError
from common.progress import Progress
from dataloader.embeddings.cache import VectorCache, text_keys

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

        Raises BatchFailed if some of the texts cannot be encoded.
        """

    def close(self) -> None:
        """Release processes and connections."""


class BatchFailed(Exception):
    """Some texts could not be encoded. `rows` are their positions in the list that was passed to `encode`."""

    def __init__(self, rows: range, why: str, out_of_memory: bool = False):
        super().__init__(why)
        self.rows, self.why, self.out_of_memory = rows, why, out_of_memory


class Texts(NamedTuple):
    """The texts and raw ids of all items, and the path of the embedding (for error messages)."""

    texts: np.ndarray    # object (N,), of str
    raw_ids: np.ndarray  # object (N,)
    path: Path


def encode_once(encoder: Encoder, items: Texts, data_root: Path, fresh: bool) -> tuple[np.ndarray, dict]:
    """Encode all items with `encode_all`, close the encoder, and return the vectors and the encoder's identity."""
    with closing(encoder):
        return encode_all(encoder, items, VectorCache(data_root, encoder.identity), fresh), encoder.identity


def encode_all(encoder: Encoder, items: Texts, cache: VectorCache, fresh: bool = False) -> np.ndarray:
    """Return the vectors of all items: float32 (N, D). Equal texts are encoded only once.

    Cached vectors are reused, unless `fresh` is true. If a run is killed, the next run encodes the remaining texts.
    The vectors are bit-identical to those of an uninterrupted run.

    Raises DataError if a text gets no usable vector; the error names the raw ids of the items. Raises ResourceError if
    there is not enough memory to encode a single text.
    """
    # np.unique sorts the texts by key. This also fixes the order of texts of equal length.
    keys, rows, text_of = np.unique(text_keys(items.texts), return_index=True, return_inverse=True)
    found, newest = _Found(keys, rows, len(items.texts)), cache.newest()
    if not fresh:
        for shard in cache.shards():
            found.take(*shard)
    missing = np.flatnonzero(~found.there)
    # Long texts first, to reduce padding. The order is fixed, so a continued run encodes the same shards.
    lengths = np.fromiter((len(items.texts[row]) for row in rows[missing]), dtype=np.int64, count=len(missing))
    missing = missing[np.argsort(-lengths, kind="stable")]
    log.info("embed: %d distinct %s, %d to encode; the others are cached in %s", len(keys), encoder.unit, len(missing),
             cache.folder)
    with Progress(f"embed {encoder.unit}", len(keys), encoder.unit, len(keys) - len(missing)) as progress:
        for start in range(0, len(missing), encoder.shard_size):
            part = missing[start:start + encoder.shard_size]
            vectors = _encode_shard(encoder, items, rows[part], progress)
            if found.vectors is not None and vectors.shape[1] != found.vectors.shape[1]:
                raise DataError(items.path, f"the model returned vectors with {vectors.shape[1]} dimensions, expected "
                                f"{found.vectors.shape[1]}", f"The cached vectors of {encoder.unit} in {cache.folder} "
                                f"have {found.vectors.shape[1]} dimensions",
                                f"use --force to encode all {encoder.unit} again")
            cache.write(keys[part], vectors)
            found.take(keys[part], vectors)
    if fresh:
        cache.drop_superseded(newest, keys)
    # If an item has the same text as an earlier item, copy the vector of the earlier item.
    again = np.flatnonzero(rows[text_of] != np.arange(len(text_of)))
    found.vectors[again] = found.vectors[rows[text_of[again]]]
    return found.vectors


class _Found:
    """The vectors that have been read or encoded so far.

    keys: the keys of the distinct texts, sorted, (U,)
    rows: for each distinct text, the index of the first item with this text, (U,). The row of `vectors` with this index
        contains the vector of the text.
    """

    def __init__(self, keys: np.ndarray, rows: np.ndarray, num_items: int):
        self.keys, self.rows, self.num_items = keys, rows, num_items
        self.there = np.zeros(len(keys), dtype=bool)
        self.vectors: np.ndarray | None = None  # float32 (N, D); None while D is unknown

    def take(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Copy the vectors of those texts that are needed and have no vector yet."""
        if self.vectors is None:
            self.vectors = np.empty((self.num_items, vectors.shape[1]), dtype=np.float32)
        if vectors.shape[1] != self.vectors.shape[1]:  # an API may later use the same name for another model
            log.warning("embed: a cached shard with %d dimensions instead of %d was skipped",
                        vectors.shape[1], self.vectors.shape[1])
            return
        position = np.searchsorted(self.keys, keys) % len(self.keys)
        wanted = (self.keys[position] == keys) & ~self.there[position]
        self.vectors[self.rows[position[wanted]]] = vectors[wanted]
        self.there[position[wanted]] = True


def _encode_shard(encoder: Encoder, items: Texts, rows: np.ndarray, progress: Progress) -> np.ndarray:
    """Encode the texts of these rows: float32 (len(rows), D).

    Raises DataError if the encoder fails, or if a vector is all zero or not finite. Raises ResourceError if there is
    not enough memory.
    """
    fix = f"use another {encoder.flag}, or check the {encoder.unit} of these items"
    try:
        vectors = encoder.encode(items.texts[rows].tolist(), progress.update)
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
