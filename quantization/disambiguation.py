"""Making semantic IDs distinct: an extra level that counts, or the nearest code that is free."""

from typing import NamedTuple

import numpy as np
import torch

from common.errors import ConfigError
from quantization.models.abstract_vq import AbstractVQ

# N items, M items that share an ID with others, L levels, K codes of the last level, G prefixes, D width

SWEEPS = 5    # over the levels, when their codewords are estimated
BATCH = 8192  # items whose distances are asked for at once


class DistinctIDs(NamedTuple):
    """Codes as they are published."""

    codes: np.ndarray           # int64 (N, L)
    codebook_sizes: list[int]
    level: int | None           # the one that disambiguates


def disambiguate(method: str, codes: np.ndarray, sizes: list[int], model: AbstractVQ, xs: torch.Tensor,
                 content: np.ndarray | None) -> DistinctIDs:
    """Codes (N, L) made distinct by `extra_level`, by `reassign`, or left as they are by `none`.

    `xs` (N, D) is what the model reads, `content` (N, D) an embedding to estimate distances from where the model
    does not tell them.
    """
    if method == "none" or not (shared := has_shared_id(codes)).any():
        return DistinctIDs(codes, sizes, None)
    if method == "extra_level":
        rank = ranks(codes)
        return DistinctIDs(np.column_stack([codes, rank]), [*sizes, int(rank.max()) + 1], codes.shape[1])
    told = _model_distances(model, xs[torch.from_numpy(shared).to(xs.device)])
    distances = estimated_distances(codes, content, sizes[-1])[shared] if told is None else told
    return DistinctIDs(reassign(codes, shared, distances), sizes, None)


def has_shared_id(codes: np.ndarray) -> np.ndarray:
    """(N, L) -> bool (N,): which items share their ID with another one."""
    bucket, counts = _buckets(codes)
    return counts[bucket] > 1


def ranks(codes: np.ndarray) -> np.ndarray:
    """(N, L) -> (N,) each item's number among those of equal codes, in item order, from 0."""
    bucket, counts = _buckets(codes)
    order = np.argsort(bucket, kind="stable")
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def reassign(codes: np.ndarray, shared: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Codes (N, L) of which all but one of each ID's items have moved to the nearest free last code.

    `shared` (N,) marks the M items that share an ID, `distances` (M, K) are theirs. In each round every item asks for
    its nearest free code, and the nearest of those that ask for the same one gets it. Raises ConfigError where more
    items share a prefix than the last level has codes.
    """
    codes, num_codes = codes.copy(), distances.shape[1]
    prefix, counts = _buckets(codes[:, :-1])
    if counts.max() > num_codes:
        raise ConfigError("common.disambiguation", f"reassign needs {counts.max()} codes in the last level, and it has "
                          f"{num_codes}", "so many items share all codes before it" if codes.shape[1] > 1 else
                          "there is no other level",
                          f"--codebook_size {counts.max()} or more, or --disambiguation extra_level")
    _, group = np.unique(prefix[shared], return_inverse=True)                                     # (M,) of G
    taken = np.zeros((group.max() + 1, num_codes), dtype=bool)
    group_of_prefix = np.full(len(counts), -1)
    group_of_prefix[prefix[shared]] = group
    lone = np.flatnonzero(~shared & (group_of_prefix[prefix] >= 0))
    taken[group_of_prefix[prefix[lone]], codes[lone, -1]] = True
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
    """What the model says of items (M, D): float32 (M, K), or None."""
    parts = [part.float().cpu() for part in map(model.last_distances, xs.split(BATCH)) if part is not None]
    return torch.cat(parts).numpy() if parts else None


def estimated_distances(codes: np.ndarray, content: np.ndarray | None, num_codes: int) -> np.ndarray:
    """(N, K) squared distances to last codewords, the sum of all levels' codewords being fitted to `content` (N, D).

    Without content every code is equally near.
    """
    if content is None:
        return np.zeros((len(codes), num_codes), dtype=np.float32)
    fitted = [np.zeros((int(level.max()) + 1, content.shape[1]), dtype=np.float32) for level in codes.T]
    fitted[-1] = np.zeros((num_codes, content.shape[1]), dtype=np.float32)
    left = content.astype(np.float32)
    for _ in range(SWEEPS):
        for codewords, level in zip(fitted, codes.T, strict=True):
            left += codewords[level]
            sums, counts = np.zeros_like(codewords), np.bincount(level, minlength=len(codewords))
            np.add.at(sums, level, left)
            codewords[:] = sums / np.maximum(counts, 1)[:, None]
            left -= codewords[level]
    left += fitted[-1][codes[:, -1]]
    return (left ** 2).sum(1, keepdims=True) - 2 * left @ fitted[-1].T + (fitted[-1] ** 2).sum(1)


def _nearest_of_each(group: np.ndarray, code: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Positions of the nearest, then the first, row of every (group, code)."""
    order = np.lexsort((np.arange(len(group)), distance, code, group))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.diff(group[order]) != 0) | (np.diff(code[order]) != 0)
    return order[first]


def _buckets(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, L) -> the number of each row's bucket of equal rows (N,), and the buckets' sizes."""
    if not codes.shape[1]:
        return np.zeros(len(codes), dtype=np.int64), np.array([len(codes)])
    _, bucket, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return bucket.reshape(-1), counts
