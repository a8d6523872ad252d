"""k-means on the device, also by angle, and with a limit to the size of clusters."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quantization.codebooks.balance import exact_prices, raise_prices
from quantization.codebooks.nearest import directions, nearest_exactly

# N rows, D width, K clusters

SAMPLE_ROWS, SAMPLE_PER_CLUSTER = 2048, 8  # that the start is drawn from, whichever is more
PRODUCT_ROWS = 4096                       # of a sample whose inner products are all held at once, 64 MB
ROUNDS, LAST_ROUNDS = 5, 50               # of raising the prices of overfull clusters: in an iteration, at the end


class Clusters(NamedTuple):
    """A row belongs to the centroid at the smallest squared distance plus offset."""

    centroids: Tensor            # (K, D)
    offsets: Tensor | None       # float64 (K,), what a place in a cluster costs so that none is overfull; None: nothing

    def assign(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N,) the cluster of each row."""
        return nearest_exactly(rows, self.centroids, self.offsets)


@torch.no_grad()
def kmeans(rows: Tensor, num_clusters: int, num_iterations: int, generator: torch.Generator, cosine: bool = False,
           max_size: int | None = None) -> Clusters:
    """Cluster (N, D) by Lloyd's algorithm, starting from rows that are spread by k-means++.

    A cluster that lost all its rows moves to one of the rows that are farthest from their centroids. With
    `cosine` a row belongs to the centroid at the smallest angle. With `max_size`, no cluster gets more than
    so many of these rows, unless more than that are equal, or nearly so. The clusters are then a power diagram,
    and start from rows drawn at random, so that there are many where rows are many.
    """
    count = max(SAMPLE_ROWS, SAMPLE_PER_CLUSTER * num_clusters)
    sample = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    centroids = _spread(sample, num_clusters, generator, drawn_alike=max_size is not None)
    prices = torch.zeros(num_clusters, device=rows.device, dtype=torch.float64)
    norms = rows.square().sum(dim=1)
    for _ in range(num_iterations):
        if max_size is not None:
            prices = raise_prices(_costs(rows, centroids), prices, max_size, ROUNDS)
        codes, distance = _assign(rows, norms, directions(centroids) if cosine else centroids, prices)
        centroids = _means(rows, codes, distance, num_clusters)
    if max_size is None:
        return Clusters(centroids, None)
    costs = _costs(rows, centroids)
    return Clusters(centroids, exact_prices(costs, raise_prices(costs, prices, max_size, LAST_ROUNDS), max_size))


def _spread(sample: Tensor, num_clusters: int, generator: torch.Generator, drawn_alike: bool) -> Tensor:
    """(K, D) rows of a sample, each drawn with a chance that grows with its squared distance from those before it.

    k-means++ (Arthur and Vassilvitskii 2007): of a few draws the one is kept that leaves the least distance, or far
    groups of rows would often get no centroid. With `drawn_alike`, every row that differs from those before it has the
    same chance. Where fewer rows differ than there are clusters, the rest are noisy copies. Nothing synchronizes.
    """
    num_draws = 1 if drawn_alike else 2 + int(math.log(num_clusters))
    draws = torch.rand(num_clusters, num_draws, generator=generator).to(sample.device, torch.float64)
    noise = 1e-3 * _scale(sample) * torch.randn(num_clusters, sample.shape[1], generator=generator).to(sample)
    norms = sample.square().sum(dim=1)
    # All products at once are much faster than a few rows' at a time, while they fit into the cache.
    products = sample @ sample.T if len(sample) <= PRODUCT_ROWS else None
    distance = torch.ones_like(norms)
    picks: list[Tensor] = []
    for draw, shift in zip(draws, noise, strict=True):
        chance = (distance > 0 if drawn_alike else distance).double().cumsum(0)
        # Where every distance is 0, the draw falls on the first row.
        drawn = torch.searchsorted(chance, draw * chance[-1], right=True).clamp_(max=len(sample) - 1)     # (draws,)
        inner = sample[drawn] @ sample.T if products is None else products[drawn]                   # (draws, rows)
        away = (norms - 2 * inner + norms[drawn].unsqueeze(1)).clamp_(min=0)
        # Rounding must not make a copy of a picked row look new.
        away = torch.where(away > 1e-5 * (norms + 1e-30), away, 0.0)
        left = away if not picks else torch.minimum(distance, away)
        best = left.sum(dim=1).argmin(dim=0, keepdim=True)
        distance, picked = left.index_select(0, best).squeeze(0), sample[drawn.index_select(0, best)]     # (1, D)
        picks.append(torch.where(chance[-1] > 0, picked, picked + shift))
    return torch.cat(picks)


def _scale(rows: Tensor) -> Tensor:
    """The rows' deviation, or where they are all alike, their size."""
    deviation = rows.std(correction=0)
    return torch.where(deviation > 0, deviation, rows.abs().mean().clamp(min=1e-6))


def _assign(rows: Tensor, norms: Tensor, centroids: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster of each row (N,), and its squared distance plus price (N,)."""
    bias = centroids.square().sum(dim=1)
    bias = bias + prices.to(bias.dtype)
    smallest, codes = torch.addmm(bias, rows, centroids.T, alpha=-2.0).min(dim=1)
    return codes, smallest + norms


def _means(rows: Tensor, codes: Tensor, distance: Tensor, num_clusters: int) -> Tensor:
    """The mean of each cluster's rows (K, D); an empty cluster gets one of the farthest rows."""
    sums = torch.zeros(num_clusters, rows.shape[1], device=rows.device, dtype=rows.dtype).index_add_(0, codes, rows)
    counts = torch.bincount(codes, minlength=num_clusters)
    farthest = distance.topk(min(num_clusters, len(rows))).indices
    empty_rank = (counts == 0).long().cumsum(0).sub(1).clamp_(min=0) % len(farthest)
    return torch.where((counts == 0).unsqueeze(1), rows[farthest[empty_rank]],
                       sums / counts.clamp(min=1).unsqueeze(1))


def _costs(rows: Tensor, centroids: Tensor) -> Tensor:
    """float64 (N, K) squared distances, but for what all clusters of a row have in common."""
    rows, centroids = rows.double(), centroids.double()
    return torch.addmm(centroids.square().sum(dim=1), rows, centroids.T, alpha=-2.0)
