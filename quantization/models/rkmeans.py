"""Residual k-means, as in GRID (arXiv 2507.22224)."""

import logging
import math

import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.codebooks.kmeans import kmeans
from quantization.codebooks.layers import Standardizer, sample
from quantization.codebooks.nearest import distances_exactly, nearest_exactly
from quantization.codebooks.sizes import at_least_one, codebook_size

from .abstract_vq import AbstractVQ

log = logging.getLogger(__name__)

# B batch, D input width, L levels, K codebook size


class RKMEANS(AbstractVQ):
    """A k-means of the embeddings, one of what is left over, and so on; nothing is trained by gradient.

    With `normalize_residuals` each level sees the direction of what is left over. With `largest_cluster` the
    clusters are power diagrams, so that the limit holds for codes that are looked up item by item.
    """

    codewords: Tensor  # (L, K, D)
    offsets: Tensor    # float64 (L, K)
    lengths: Tensor    # (L,) of what is left over; means, where it is normalized

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        self.params, where = config["rkmeans"]["model_params"], "rkmeans.model_params"
        self.size = codebook_size(self.params["codebook_size"], config["data"]["num_items"], where)
        num_levels = at_least_one(self.params["num_levels"], f"{where}.num_levels")
        self.iterations = at_least_one(self.params["iterations"], f"{where}.iterations")
        self.max_rows = at_least_one(self.params["max_rows"], f"{where}.max_rows")
        self.max_size = self.params["largest_cluster"]
        if self.max_size is not None and not (isinstance(self.max_size, int | float) and self.max_size >= 1):
            raise ConfigError(f"{where}.largest_cluster", f"is {self.largest!r}", "it must be null, or at least 1: a "
                              "multiple of items / codebook_size", "correct the value")
        self.normalized = self.params["normalize_residuals"]
        self.standardizer = Standardizer(input_size, self.params["standardize"])
        self.register_buffer("codewords", torch.zeros(num_levels, self.size, input_size))
        self.register_buffer("offsets", torch.zeros(num_levels, self.size, dtype=torch.float64))
        self.register_buffer("lengths", torch.ones(num_levels))

    @property
    def codebook_sizes(self) -> list[int]:
        return [self.size] * len(self.codewords)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, reconstruction, _ = self._walk(self.standardizer(xs.double()))
        return self.standardizer.undo(reconstruction).to(xs.dtype), xs.new_zeros(()), codes

    def get_codes(self, xs: Tensor) -> Tensor:
        return self._walk(self.standardizer(xs.double()))[0]

    def last_distances(self, xs: Tensor) -> Tensor:
        residual = self._walk(self.standardizer(xs.double()))[2]
        return distances_exactly(residual, self.codewords[-1], self.offsets[-1])

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        return {"loss_total": (forward_outputs[0] - original_xs).square().sum(dim=1).mean()}

    @torch.no_grad()
    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        self.standardizer.measure(xs)
        rows = self.standardizer(sample(xs, generator, self.max_rows))
        max_size = None if self.max_size is None else math.ceil(self.max_size * len(rows) / self.size)
        for level in range(len(self.codewords)):
            if self.normalized:
                self.lengths[level] = rows.norm(dim=1).mean()
            rows = self._seen(rows)
            clusters = kmeans(rows, self.size, self.iterations, generator, max_size=max_size)
            self.codewords[level] = clusters.centroids
            if clusters.offsets is not None:
                self.offsets[level] = clusters.offsets
            codes = nearest_exactly(rows, self.codewords[level], self.offsets[level])
            if max_size is not None and (found := int(torch.bincount(codes).max())) > max_size:
                log.warning("rkmeans: level %d has a cluster of %d items, and %d were allowed: too many are equal, or "
                            "nearly so", level + 1, found, max_size)
            rows = rows - self.codewords[level][codes]
        return True

    def _walk(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float64 (B, D) -> codes (B, L), what the codes alone say of the rows (B, D), and what the last level sees."""
        codes, reconstruction, length = [], torch.zeros_like(rows), 1.0
        for codewords, offsets, mean_length in zip(self.codewords, self.offsets, self.lengths, strict=True):
            seen = self._seen(rows)
            codes.append(nearest_exactly(seen, codewords, offsets))
            length = length * mean_length
            reconstruction = reconstruction + length * codewords[codes[-1]]
            rows = seen - codewords[codes[-1]]
        return torch.stack(codes, dim=1), reconstruction, seen

    def _seen(self, rows: Tensor) -> Tensor:
        """What a level sees of what is left over: the direction alone, if lengths are normalized away."""
        return torch.nn.functional.normalize(rows, dim=1) if self.normalized else rows
