"""All items' texts to vectors: what the cache has is taken from it, the rest is encoded shard by shard."""

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

NUM_NAMED = 10  # raw ids in an error

# N items, U different texts among them, D dimensions


class Encoder(Protocol):
    """Turns texts (or the names of images) into vectors; a text's vector does not depend on the other texts."""

    unit: str        # what it encodes, in messages: texts
    flag: str        # by which the user chose it
    identity: dict   # what determines a vector beside its text, as JSON holds it; no secrets
    shard_size: int  # texts that are handed over, and written to the disk, together

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """float32 (len(texts), D); `done(n)` after every n texts. Raises BatchFailed if the fault is in the texts."""

    def close(self) -> None:
        """Give back processes and connections."""


class BatchFailed(Exception):
    """Some of the texts could not be encoded: `rows`, by their place in the list that was handed over."""

    def __init__(self, rows: range, why: str, out_of_memory: bool = False):
        super().__init__(why)
        self.rows, self.why, self.out_of_memory = rows, why, out_of_memory


class Texts(NamedTuple):
    """Item texts, each with the raw id of its item, and where the vectors will go (for errors)."""

    texts: np.ndarray    # object (N,), of str
    raw_ids: np.ndarray  # object (N,)
    path: Path


def encode_once(encoder: Encoder, items: Texts, data_root: Path, fresh: bool) -> tuple[np.ndarray, dict]:
    """What `encode_all` gives, and what made it, for the artifact to tell; the encoder is closed then."""
    with closing(encoder):
        return encode_all(encoder, items, VectorCache(data_root, encoder.identity), fresh), encoder.identity


def encode_all(encoder: Encoder, items: Texts, cache: VectorCache, fresh: bool = False) -> np.ndarray:
    """float32 (N, D), one row an item. Equal texts are encoded once; `fresh` encodes what the cache has, too.

    What is missing is cut into shards in a fixed order (long texts first, so that little padding is computed), and
    each is written to the cache as soon as it is encoded. After a kill the shards that are left are therefore the
    same as they would have been, and so are all vectors, to the bit. Raises DataError naming the raw ids of texts that
    get no usable vector, and ResourceError if there is not enough memory for even one of them.
    """
    # np.unique sorts by key, which settles the order of texts of one length.
    keys, rows, text_of = np.unique(text_keys(items.texts), return_index=True, return_inverse=True)
    found, newest = _Found(keys, rows, len(items.texts)), cache.newest()
    if not fresh:
        for shard in cache.shards():
            found.take(*shard)
    missing = np.flatnonzero(~found.there)
    lengths = np.fromiter((len(items.texts[row]) for row in rows[missing]), dtype=np.int64, count=len(missing))
    missing = missing[np.argsort(-lengths, kind="stable")]
    log.info("embed: %d different %s, %d to encode; the others are in %s", len(keys), encoder.unit, len(missing),
             cache.folder)
    with Progress(f"embed {encoder.unit}", len(keys), encoder.unit, len(keys) - len(missing)) as progress:
        for start in range(0, len(missing), encoder.shard_size):
            part = missing[start:start + encoder.shard_size]
            vectors = _encode_shard(encoder, items, rows[part], progress)
            if found.vectors is not None and vectors.shape[1] != found.vectors.shape[1]:
                raise DataError(items.path, f"the model gives {vectors.shape[1]} dimensions",
                                f"it gave {found.vectors.shape[1]} to the {encoder.unit} in {cache.folder}",
                                "--force, which encodes those again")
            cache.write(keys[part], vectors)
            found.take(keys[part], vectors)
    if fresh:
        cache.drop_superseded(newest, keys)
    # Items whose text an earlier item has, too.
    again = np.flatnonzero(rows[text_of] != np.arange(len(text_of)))
    found.vectors[again] = found.vectors[rows[text_of[again]]]
    return found.vectors


class _Found:
    """The vectors that are there already, each in the row of the first item with its text."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray, num_items: int):
        self.keys, self.rows, self.num_items = keys, rows, num_items  # (U,) sorted, and (U,)
        self.there = np.zeros(len(keys), dtype=bool)
        self.vectors: np.ndarray | None = None  # float32 (N, D), once D is known

    def take(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Copy the vectors of texts that are wanted and not there yet."""
        if self.vectors is None:
            self.vectors = np.empty((self.num_items, vectors.shape[1]), dtype=np.float32)
        if vectors.shape[1] != self.vectors.shape[1]:  # of what an API called by the same name in other times
            log.warning("embed: a shard of the cache has %d dimensions, not %d: it is not used",
                        vectors.shape[1], self.vectors.shape[1])
            return
        position = np.searchsorted(self.keys, keys) % len(self.keys)
        wanted = (self.keys[position] == keys) & ~self.there[position]
        self.vectors[self.rows[position[wanted]]] = vectors[wanted]
        self.there[position[wanted]] = True


def _encode_shard(encoder: Encoder, items: Texts, rows: np.ndarray, progress: Progress) -> np.ndarray:
    """float32 (len(rows), D), every row finite and not all zero."""
    mend = f"another {encoder.flag}, or look at the {encoder.unit} of those items"
    try:
        vectors = encoder.encode(items.texts[rows].tolist(), progress.update)
    except BatchFailed as failed:
        ids = named(items.raw_ids[np.sort(rows[failed.rows])])
        if failed.out_of_memory:
            raise ResourceError(items.path, f"there is not enough memory to encode even one of the {encoder.unit}",
                                f"Items: {ids}", f"a smaller {encoder.flag}, or another --device") from failed
        raise DataError(items.path, f"the model failed on {len(failed.rows)} {encoder.unit}",
                        f"{failed.why}. Items: {ids}", mend) from failed
    bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
    if bad.any():
        raise DataError(items.path, f"the model gave no usable vector for {bad.sum()} {encoder.unit} (not finite, or "
                        "all zero)", f"Items: {named(items.raw_ids[np.sort(rows[bad])])}", mend)
    return vectors


def named(raw_ids: np.ndarray) -> str:
    """The first of them, and how many more there are."""
    more = len(raw_ids) - NUM_NAMED
    return ", ".join(raw_ids[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
