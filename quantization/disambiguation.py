"""Disambiguation: make semantic IDs distinct. Either add a level, or change codes of the last level."""

import logging
from typing import NamedTuple

import numpy as np
import torch

from common.errors import ConfigError
from quantization.models.abstract_vq import AbstractVQ

log = logging.getLogger(__name__)

# N items, M items that share their ID with another item, L levels, K codes of the last level, D width
# The prefix of an item is its semantic ID without the last code. The M items have G different prefixes.

SWEEPS = 5    # number of passes over the levels to estimate the codewords
BATCH = 8192  # items per call of `last_distances`


class DistinctIDs(NamedTuple):
    """The result of `disambiguate`."""

    codes: np.ndarray           # int64 (N, L)
    codebook_sizes: list[int]
    level: int | None           # index of the extra level, or None if there is none
    method: str                 # extra_level, reassign or none


def disambiguate(method: str, codes: np.ndarray, sizes: list[int], model: AbstractVQ, xs: torch.Tensor,
                 content: np.ndarray | None) -> DistinctIDs:
    """Make the semantic IDs of all items distinct.

    method: `extra_level` adds a level that numbers the items with the same codes; `reassign` changes codes of the last
        level; `none` returns the codes unchanged; `auto` is `reassign` if the levels have no order and the last level
        has enough codes, otherwise `extra_level`
    codes: (N, L)
    sizes: the L codebook sizes
    xs: the input of the model, (N, D)
    content: an embedding of the items, (N, D), or None; `reassign` uses it if the model does not provide distances

    Raises ConfigError if the last level has too few codes for `reassign`.
    """
    if method == "auto":
        method = _choose(codes, sizes[-1], model)
    if method == "none" or not (shared := has_shared_id(codes)).any():
        return DistinctIDs(codes, sizes, None, method)
    if method == "extra_level":
        rank = ranks(codes)
        return DistinctIDs(np.column_stack([codes, rank]), [*sizes, int(rank.max()) + 1], codes.shape[1], method)
    exact = _model_distances(model, xs[torch.from_numpy(shared).to(xs.device)])
    distances = estimated_distances(codes, content, sizes[-1])[shared] if exact is None else exact
    return DistinctIDs(reassign(codes, shared, distances), sizes, None, method)


def _choose(codes: np.ndarray, num_codes: int, model: AbstractVQ) -> str:
    """Return the method for `auto`. num_codes: number of codes of the last level"""
    # The numbers of an extra level mean nothing, but a recommender learns from them as from other codes. If the levels
    # have an order, a generator predicts these numbers last, when all other codes are known.
    if model.has_ordered_levels:
        return "extra_level"
    largest = int(_buckets(codes[:, :-1])[1].max())
    if largest <= num_codes:
        return "reassign"
    log.info("quantization: an extra level makes the IDs distinct: %d items have the same codes in all levels but the "
             "last, which has %d codes", largest, num_codes)
    return "extra_level"


def has_shared_id(codes: np.ndarray) -> np.ndarray:
    """For each item, return whether another item has the same codes: (N, L) -> bool (N,)."""
    bucket, counts = _buckets(codes)
    return counts[bucket] > 1


def ranks(codes: np.ndarray) -> np.ndarray:
    """Return the rank of each item among the items with the same codes (0, 1, 2, ... in item order): (N, L) -> (N,)."""
    bucket, counts = _buckets(codes)
    order = np.argsort(bucket, kind="stable")
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def reassign(codes: np.ndarray, shared: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Give items that share an ID different last codes. One of the items keeps its last code.

    codes: (N, L)
    shared: True for the M items that share their ID with another item, (N,)
    distances: distances from these M items to the K codes of the last level, (M, K)

    A code goes to the nearest item. The other items get the nearest code that is still free.

    Raises ConfigError if the last level has too few codes.
    """
    # First, each item requests its own last code. If several items with the same prefix request the same code, the
    # nearest item gets it. The others then request their nearest free code, until every item has a code.
    codes, num_codes = codes.copy(), distances.shape[1]
    prefix, counts = _buckets(codes[:, :-1])
    if counts.max() > num_codes:
        raise ConfigError("common.disambiguation", f"reassign needs {counts.max()} codes in the last level, but this "
                          f"level has only {num_codes}", f"{counts.max()} items have the same codes in all other levels"
                          if codes.shape[1] > 1 else "The IDs have only one level, so each item needs its own code",
                          f"use --codebook_size {counts.max()} or larger, or --disambiguation extra_level")
    _, group = np.unique(prefix[shared], return_inverse=True)                                     # (M,), 0 to G - 1
    taken = np.zeros((group.max() + 1, num_codes), dtype=bool)
    group_of_prefix = np.full(len(counts), -1)
    group_of_prefix[prefix[shared]] = group
    fixed = np.flatnonzero(~shared & (group_of_prefix[prefix] >= 0))  # these items keep their code
    taken[group_of_prefix[prefix[fixed]], codes[fixed, -1]] = True
    wanted, waiting = codes[shared, -1], np.arange(len(group))
    while True:
        keeps = waiting[_nearest_of_each(group[waiting], wanted[waiting], distances[waiting, wanted[waiting]])]
        taken[group[keeps], wanted[keeps]] = True
        waiting = np.setdiff1d(waiting, keeps, assume_unique=True)
        if not len(waiting):
            break
        wanted[waiting] = np.where(taken[group[waiting]], np.inf, distances[waiting]).argmin(axis=1)
    codes[shared, -1] = wanted
    return codes


@torch.no_grad()
def _model_distances(model: AbstractVQ, xs: torch.Tensor) -> np.ndarray | None:
    """Return the distances from items to the K codes of the last level: (M, D) -> float32 (M, K).

    Return None if the model does not provide distances.
    """
    parts = [part.float().cpu() for part in map(model.last_distances, xs.split(BATCH)) if part is not None]
    return torch.cat(parts).numpy() if parts else None


def estimated_distances(codes: np.ndarray, content: np.ndarray | None, num_codes: int) -> np.ndarray:
    """Estimate the squared distances from each item to the codewords of the last level: (N, K).

    codes: (N, L)
    content: an embedding of the items, (N, D); if it is None, all distances are 0
    num_codes: number of codes of the last level, K
    """
    # Fit codewords, so that the sum of an item's codewords is close to its row of `content`. Then measure the distances
    # from the item's residual at the last level.
    if content is None:
        return np.zeros((len(codes), num_codes), dtype=np.float32)
    fitted = [np.zeros((int(level.max()) + 1, content.shape[1]), dtype=np.float32) for level in codes.T]
    fitted[-1] = np.zeros((num_codes, content.shape[1]), dtype=np.float32)
    residual = content.astype(np.float32)
    for _ in range(SWEEPS):
        for codewords, level in zip(fitted, codes.T, strict=True):
            residual += codewords[level]
            sums, counts = np.zeros_like(codewords), np.bincount(level, minlength=len(codewords))
            np.add.at(sums, level, residual)
            codewords[:] = sums / np.maximum(counts, 1)[:, None]
            residual -= codewords[level]
    residual += fitted[-1][codes[:, -1]]
    return (residual ** 2).sum(1, keepdims=True) - 2 * residual @ fitted[-1].T + (fitted[-1] ** 2).sum(1)


def _nearest_of_each(group: np.ndarray, code: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """For each group and code, return the index of the row with the smallest distance.

    All arguments have one value per row. If distances are equal, the first row is returned.
    """
    order = np.lexsort((np.arange(len(group)), distance, code, group))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.diff(group[order]) != 0) | (np.diff(code[order]) != 0)
    return order[first]


def _buckets(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put equal rows of codes (N, L) into one bucket. Return the bucket of each row (N,), and the bucket sizes."""
    if not codes.shape[1]:
        return np.zeros(len(codes), dtype=np.int64), np.array([len(codes)])
    _, bucket, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return bucket.reshape(-1), counts
