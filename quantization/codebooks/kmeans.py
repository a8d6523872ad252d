"""k-means on the CPU or GPU, optionally with the cosine distance or with a maximum cluster size."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.precision import matmul_precision
from quantization.codebooks.balance import exact_prices, raise_prices
from quantization.codebooks.nearest import directions, nearest_exactly

# N rows, D width, K clusters

# The initial centroids are drawn from a sample of SAMPLE_ROWS or SAMPLE_PER_CLUSTER * K rows, whichever is larger.
SAMPLE_ROWS, SAMPLE_PER_CLUSTER = 2048, 8
PRODUCT_ROWS = 4096          # in a sample of at most this size, all inner products are computed at once (64 MB)
ROUNDS, LAST_ROUNDS = 5, 50  # maximum rounds of `raise_prices` in each k-means iteration, and after the last iteration


class Clusters(NamedTuple):
    """The result of k-means. A row belongs to the cluster with the smallest sum of squared distance and offset."""

    centroids: Tensor            # (K, D)
    offsets: Tensor | None       # float64 (K,), added to the squared distances to limit the sizes; None: no limit

    def assign(self, rows: Tensor) -> Tensor:
        """Return the cluster of each row: (N, D) -> (N,)."""
        return nearest_exactly(rows, self.centroids, self.offsets)


@torch.no_grad()
@matmul_precision("ieee")
def kmeans(rows: Tensor, num_clusters: int, num_iterations: int, generator: torch.Generator, cosine: bool = False,
           max_size: int | None = None, start: Tensor | None = None) -> Clusters:
    """Cluster rows (N, D) with Lloyd's algorithm, initialized by k-means++ or with the centroids `start` (K, D).

    With `cosine`, a row belongs to the centroid at the smallest angle.

    With `max_size`, no cluster has more than `max_size` rows, unless more than `max_size` rows are equal or nearly
    equal. The initial centroids are then random rows instead of k-means++.
    """
    # With `max_size`, dense regions need many centroids; random rows provide them. The centroids and the offsets of the
    # result form a power diagram.
    if start is None:
        count = max(SAMPLE_ROWS, SAMPLE_PER_CLUSTER * num_clusters)
        sample = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
        start = _initial_centroids(sample, num_clusters, generator, uniform=max_size is not None)
    centroids = start
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


def _initial_centroids(sample: Tensor, num_clusters: int, generator: torch.Generator, uniform: bool) -> Tensor:
    """Draw the initial centroids (K, D) from the rows of a sample, with k-means++ (Arthur and Vassilvitskii 2007).

    With `uniform`, the centroids are random distinct rows instead. If there are fewer distinct rows than clusters, the
    remaining centroids are copies of rows with added noise.
    """
    # The probability of a row is proportional to the squared distance to the nearest centroid so far. For each
    # centroid, draw several candidates, and keep the one with the smallest sum of distances. With a single candidate,
    # distant groups of rows often get no centroid. This function does not wait for the GPU.
    num_draws = 1 if uniform else 2 + int(math.log(num_clusters))
    draws = torch.rand(num_clusters, num_draws, generator=generator).to(sample.device, torch.float64)
    noise = 1e-3 * _scale(sample) * torch.randn(num_clusters, sample.shape[1], generator=generator).to(sample)
    norms = sample.square().sum(dim=1)
    # If all inner products fit into the cache, it is much faster to compute them at once than a few rows at a time.
    products = sample @ sample.T if len(sample) <= PRODUCT_ROWS else None
    distance = torch.ones_like(norms)
    picks: list[Tensor] = []
    for draw, shift in zip(draws, noise, strict=True):
        cumulative = (distance > 0 if uniform else distance).double().cumsum(0)
        # If all distances are 0, the search returns len(sample), and the last row is drawn.
        drawn = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
        drawn = drawn.clamp_(max=len(sample) - 1)                                                   # (draws,)
        inner = sample[drawn] @ sample.T if products is None else products[drawn]                   # (draws, rows)
        distances = (norms - 2 * inner + norms[drawn].unsqueeze(1)).clamp_(min=0)
        # Because of rounding errors, a copy of a centroid can have a small distance; set it to 0.
        distances = torch.where(distances > 1e-5 * (norms + 1e-30), distances, 0.0)
        remaining = distances if not picks else torch.minimum(distance, distances)
        best = remaining.sum(dim=1).argmin(dim=0, keepdim=True)
        distance, picked = remaining.index_select(0, best).squeeze(0), sample[drawn.index_select(0, best)]     # (1, D)
        picks.append(torch.where(cumulative[-1] > 0, picked, picked + shift))
    return torch.cat(picks)


def _scale(rows: Tensor) -> Tensor:
    """Return the standard deviation of all elements, or their mean absolute value if all elements are equal."""
    deviation = rows.std(correction=0)
    return torch.where(deviation > 0, deviation, rows.abs().mean().clamp(min=1e-6))


def _assign(rows: Tensor, norms: Tensor, centroids: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each row to the cluster for which the squared distance plus the price is smallest.

    Return the cluster of each row (N,), and the squared distance plus price of this cluster (N,).

    norms: (N,), the squared lengths of the rows
    prices: (K,), the price of each cluster: a number that is added to all squared distances to its centroid. A higher
        price makes the cluster smaller.
    """
    bias = centroids.square().sum(dim=1)
    bias = bias + prices.to(bias.dtype)
    smallest, codes = torch.addmm(bias, rows, centroids.T, alpha=-2.0).min(dim=1)
    return codes, smallest + norms


def _means(rows: Tensor, codes: Tensor, distance: Tensor, num_clusters: int) -> Tensor:
    """Return the mean of the rows of each cluster: (K, D).

    For an empty cluster, return one of the rows with the largest `distance` (N,) instead of a mean.
    """
    sums = torch.zeros(num_clusters, rows.shape[1], device=rows.device, dtype=rows.dtype).index_add_(0, codes, rows)
    counts = torch.bincount(codes, minlength=num_clusters)
    farthest = distance.topk(min(num_clusters, len(rows))).indices
    empty_rank = (counts == 0).long().cumsum(0).sub(1).clamp_(min=0) % len(farthest)
    return torch.where((counts == 0).unsqueeze(1), rows[farthest[empty_rank]],
                       sums / counts.clamp(min=1).unsqueeze(1))


def _costs(rows: Tensor, centroids: Tensor) -> Tensor:
    """Return the squared distance from each row to each centroid, minus |row|^2: float64 (N, K)."""
    # |row|^2 is the same for all clusters and does not affect the assignment.
    rows, centroids = rows.double(), centroids.double()
    return torch.addmm(centroids.square().sum(dim=1), rows, centroids.T, alpha=-2.0)
