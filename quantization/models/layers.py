"""Building blocks that quantizers share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# N rows, D width, K codewords


class MLP(nn.Sequential):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, widths: list[int]):
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class Codebook(nn.Module):
    """K trainable codewords, and how often each was used since the last restart."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.codewords = nn.Parameter(torch.empty(size, width))
        nn.init.uniform_(self.codewords, -1.0 / size, 1.0 / size)
        self.register_buffer("usage", torch.zeros(size))

    def nearest(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N,) index of the nearest codeword."""
        return nearest(rows, self.codewords)

    def lookup(self, codes: Tensor) -> Tensor:
        """(N,) -> (N, D)."""
        return F.embedding(codes, self.codewords)

    @torch.no_grad()
    def count(self, codes: Tensor) -> None:
        self.usage.index_add_(0, codes, torch.ones_like(codes, dtype=self.usage.dtype))

    @torch.no_grad()
    def restart_dead(self, rows: Tensor, generator: torch.Generator) -> None:
        """Move every codeword that nothing used to a random one of `rows` (N, D); forget the counts."""
        picks = torch.randint(len(rows), (len(self.codewords),), generator=generator).to(rows.device)
        dead = (self.usage == 0).unsqueeze(1)
        self.codewords.copy_(torch.where(dead, rows[picks], self.codewords))
        self.usage.zero_()


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) index of the centroid at the smallest Euclidean distance."""
    # |r - c|^2 without |r|^2, which is the same for every centroid.
    return torch.addmm(centroids.square().sum(dim=1), rows, centroids.T, beta=1.0, alpha=-2.0).argmin(dim=1)


@torch.no_grad()
def kmeans(rows: Tensor, num_clusters: int, num_iterations: int, generator: torch.Generator) -> Tensor:
    """(N, D) -> (K, D) centroids by Lloyd's algorithm from distinct random rows.

    A cluster that lost all its rows moves to one of the rows that are farthest from their centroids.
    """
    picks = torch.randperm(len(rows), generator=generator)[:num_clusters].to(rows.device)
    centroids = rows[picks].clone()
    if len(centroids) < num_clusters:  # fewer rows than clusters: the rest start as noisy copies
        extra = torch.randint(len(rows), (num_clusters - len(rows),), generator=generator).to(rows.device)
        noise = torch.randn(len(extra), rows.shape[1], generator=generator).to(rows.device)
        centroids = torch.cat([centroids, rows[extra] + 1e-3 * rows.std() * noise])
    for _ in range(num_iterations):
        codes = nearest(rows, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, codes, rows)
        counts = torch.zeros(num_clusters, device=rows.device, dtype=rows.dtype).index_add_(
            0, codes, torch.ones_like(codes, dtype=rows.dtype))
        distance = (rows - centroids[codes]).square().sum(dim=1)
        farthest = distance.topk(min(num_clusters, len(rows))).indices
        empty_rank = (counts == 0).long().cumsum(0).sub(1).clamp_(min=0) % len(farthest)
        centroids = torch.where((counts == 0).unsqueeze(1), rows[farthest[empty_rank]],
                                sums / counts.clamp(min=1).unsqueeze(1))
    return centroids
