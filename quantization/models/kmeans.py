"""k-means on the device, also by angle, and with a limit to the size of clusters."""

from typing import NamedTuple

import torch
from torch import Tensor

from .nearest import directions, nearest

# N rows, D width, K clusters

ROUNDS, LAST_ROUNDS = 5, 300  # of raising the prices of overfull clusters: in an iteration, at the end


class Clusters(NamedTuple):
    """A row belongs to the centroid at the smallest squared distance plus offset."""

    centroids: Tensor            # (K, D)
    offsets: Tensor | None       # (K,), what a place in a cluster costs so that none is overfull; None: nothing

    def assign(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N,) the cluster of each row."""
        return nearest(rows, self.centroids, self.offsets)


@torch.no_grad()
def kmeans(rows: Tensor, num_clusters: int, num_iterations: int, generator: torch.Generator, cosine: bool = False,
           largest: int | None = None) -> Clusters:
    """Cluster (N, D) by Lloyd's algorithm, starting from rows that are spread by k-means++.

    A cluster that lost all its rows moves to one of the rows that are farthest from their centroids. With
    `cosine` a row belongs to the centroid at the smallest angle. With `largest`, no cluster gets more than
    so many of these rows (unless that many are equal): the clusters are then a power diagram.
    """
    centroids = _spread(rows, num_clusters, generator)
    offsets = None if largest is None else torch.zeros(num_clusters, device=rows.device, dtype=rows.dtype)
    for _ in range(num_iterations):
        if largest is not None:
            offsets = _prices(rows, centroids, offsets, largest, ROUNDS)
        codes = nearest(rows, directions(centroids) if cosine else centroids, offsets)
        centroids = _means(rows, codes, centroids)
    if largest is not None:
        offsets = _prices(rows, centroids, offsets, largest, LAST_ROUNDS)
    return Clusters(centroids, offsets)


def _spread(rows: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """(K, D) rows, each drawn with a chance that grows with its squared distance from those before it (k-means++).

    Drawn from a sample of 16 rows a cluster, without a synchronization. Where fewer rows differ than there are
    clusters, the rest are noisy copies.
    """
    sample = torch.randperm(len(rows), generator=generator)[:16 * num_clusters].to(rows.device)
    sample = rows[sample]
    draws = torch.rand(num_clusters, generator=generator).to(rows.device, torch.float64)
    noise = torch.randn(num_clusters, rows.shape[1], generator=generator).to(rows)
    norms = sample.square().sum(dim=1)
    distance, picks = torch.ones_like(norms), []
    for draw in draws:
        chance = distance.double().cumsum(0)
        # Where every distance is 0, the draw falls on the first row.
        pick = torch.searchsorted(chance, (draw * chance[-1]).unsqueeze(0), right=True).clamp_(max=len(sample) - 1)
        picked = sample[pick]                                                                       # (1, D)
        away = (norms - 2 * (sample @ picked.T).squeeze(1) + picked.square().sum()).clamp_(min=0)
        # Rounding must not make a copy of a picked row look new.
        away = torch.where(away > 1e-5 * (norms + 1e-30), away, 0.0)
        distance = away if not picks else torch.minimum(distance, away)
        picks.append(torch.where(chance[-1] > 0, picked, picked + 1e-3 * _scale(rows) * noise[len(picks)]))
    return torch.cat(picks)


def _scale(rows: Tensor) -> Tensor:
    """The rows' deviation, or where they are all alike, their size."""
    deviation = rows.std(correction=0)
    return torch.where(deviation > 0, deviation, rows.abs().mean().clamp(min=1e-6))


def _means(rows: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster's rows; an empty cluster gets one of the farthest rows."""
    num_clusters = len(centroids)
    sums = torch.zeros_like(centroids).index_add_(0, codes, rows)
    counts = torch.zeros(num_clusters, device=rows.device, dtype=rows.dtype).index_add_(
        0, codes, torch.ones_like(codes, dtype=rows.dtype))
    distance = (rows - centroids[codes]).square().sum(dim=1)
    farthest = distance.topk(min(num_clusters, len(rows))).indices
    empty_rank = (counts == 0).long().cumsum(0).sub(1).clamp_(min=0) % len(farthest)
    return torch.where((counts == 0).unsqueeze(1), rows[farthest[empty_rank]],
                       sums / counts.clamp(min=1).unsqueeze(1))


def _prices(rows: Tensor, centroids: Tensor, offsets: Tensor, largest: int, num_rounds: int) -> Tensor:
    """Raise the offsets (K,) of overfull clusters until so many rows have left that each is full at most.

    Like an auction: the rows that lose least by leaving go first, each to its second choice.
    """
    costs = torch.addmm(centroids.square().sum(dim=1), rows, centroids.T, alpha=-2.0)               # (N, K)
    offsets = offsets - offsets.min()
    for _ in range(num_rounds):
        best, codes = (costs + offsets).topk(2, dim=1, largest=False)
        codes, margin = codes[:, 0], best[:, 1] - best[:, 0]
        counts = torch.bincount(codes, minlength=len(centroids))
        surplus = counts - largest
        if not (surplus > 0).any():
            break
        # Each cluster's rows side by side, those with the smallest margin first.
        order = margin.argsort()
        order = order[codes[order].argsort(stable=True)]
        last = (counts.cumsum(0) - counts + surplus.clamp(min=1) - 1).clamp_(max=len(rows) - 1)
        raised = margin[order[last]] + 1e-6 * best.abs().mean()
        offsets = torch.where(surplus > 0, offsets + raised, offsets)
    return offsets
