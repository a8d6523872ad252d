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
    """A quantizer that applies k-means to the embeddings, then to the residuals, and so on.

    Nothing is trained by gradient. With `normalize_residuals`, the residuals are scaled to length 1 before the k-means
    of each level.

    With `largest_cluster`, the training limits the sizes of the clusters. After the training, the code of an item
    depends only on its own embedding, as without a limit.
    """

    codewords: Tensor  # (L, K, D)
    offsets: Tensor    # float64 (L, K), added to the squared distances to limit the cluster sizes (power diagram)
    lengths: Tensor    # (L,) mean length of each level's residuals before they are normalized; 1 if they are not

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        self.params, where = config["rkmeans"]["model_params"], "rkmeans.model_params"
        self.size = codebook_size(self.params["codebook_size"], config["data"]["num_items"], where)
        num_levels = at_least_one(self.params["num_levels"], f"{where}.num_levels")
        self.iterations = at_least_one(self.params["iterations"], f"{where}.iterations")
        self.max_rows = at_least_one(self.params["max_rows"], f"{where}.max_rows")
        self.max_size = self.params["largest_cluster"]
        if self.max_size is not None and not (isinstance(self.max_size, int | float) and self.max_size >= 1):
            raise ConfigError(f"{where}.largest_cluster", "must be null or a number of at least 1, got "
                              f"{self.max_size!r}", "The maximum cluster size is largest_cluster * items / "
                              "codebook_size", "correct the value")
        self.normalized = self.params["normalize_residuals"]
        self.standardizer = Standardizer(input_size, self.params["standardize"])
        self.register_buffer("codewords", torch.zeros(num_levels, self.size, input_size))
        self.register_buffer("offsets", torch.zeros(num_levels, self.size, dtype=torch.float64))
        self.register_buffer("lengths", torch.ones(num_levels))

    @property
    def codebook_sizes(self) -> list[int]:
        return [self.size] * len(self.codewords)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, reconstruction, _ = self._encode(self.standardizer(xs.double()))
        return self.standardizer.undo(reconstruction).to(xs.dtype), xs.new_zeros(()), codes

    def get_codes(self, xs: Tensor) -> Tensor:
        return self._encode(self.standardizer(xs.double()))[0]

    def last_distances(self, xs: Tensor) -> Tensor:
        last_inputs = self._encode(self.standardizer(xs.double()))[2]
        return distances_exactly(last_inputs, self.codewords[-1], self.offsets[-1])

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
            rows = self._level_inputs(rows)
            clusters = kmeans(rows, self.size, self.iterations, generator, max_size=max_size)
            self.codewords[level] = clusters.centroids
            if clusters.offsets is not None:
                self.offsets[level] = clusters.offsets
            codes = nearest_exactly(rows, self.codewords[level], self.offsets[level])
            if max_size is not None and (found := int(torch.bincount(codes).max())) > max_size:
                log.warning("rkmeans: level %d has a cluster of %d items, but the limit is %d. Too many items are "
                            "equal or nearly equal", level + 1, found, max_size)
            rows = rows - self.codewords[level][codes]
        return True

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode standardized float64 rows (B, D).

        Return the codes (B, L), the reconstructed rows (B, D), and the inputs of the last level (B, D).
        """
        codes, reconstruction, length = [], torch.zeros_like(rows), 1.0
        for codewords, offsets, mean_length in zip(self.codewords, self.offsets, self.lengths, strict=True):
            inputs = self._level_inputs(rows)
            codes.append(nearest_exactly(inputs, codewords, offsets))
            length = length * mean_length
            reconstruction = reconstruction + length * codewords[codes[-1]]
            rows = inputs - codewords[codes[-1]]
        return torch.stack(codes, dim=1), reconstruction, inputs

    def _level_inputs(self, rows: Tensor) -> Tensor:
        """Return the residuals (B, D), scaled to length 1 if `normalize_residuals` is set."""
        return torch.nn.functional.normalize(rows, dim=1) if self.normalized else rows
