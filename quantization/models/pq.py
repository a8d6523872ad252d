"""Product quantization (Jégou et al. 2011, IEEE TPAMI 33(1))."""

import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.codebooks.kmeans import kmeans
from quantization.codebooks.layers import sample
from quantization.codebooks.nearest import distances_exactly, nearest_exactly
from quantization.codebooks.sizes import at_least_one, codebook_size

from .abstract_vq import AbstractVQ

# B batch, D input width, L levels (parts), P part width, K codebook size


class PQ(AbstractVQ):
    """A quantizer that divides each embedding into L parts of equal width, with a separate k-means for each part.

    Each part gives one code. The codes are independent of each other: unlike with residual quantization, their order
    has no meaning.
    """

    section = "pq"
    has_ordered_levels = False
    codewords: Tensor  # (L, K, P)

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        params, where = config[self.section]["model_params"], f"{self.section}.model_params"
        self.num_levels = at_least_one(params["num_levels"], f"{where}.num_levels")
        if input_size % self.num_levels:
            fitting = [n for n in range(1, min(input_size, 64) + 1) if input_size % n == 0]
            raise ConfigError(f"{where}.num_levels", f"must divide the {input_size} columns of the embedding into "
                              f"equal parts, got {self.num_levels}",
                              fix=f"use one of {', '.join(map(str, fitting))}")
        self.size = codebook_size(params["codebook_size"], config["data"]["num_items"], where)
        self.iterations = at_least_one(params["iterations"], f"{where}.iterations")
        self.max_rows = at_least_one(params["max_rows"], f"{where}.max_rows")
        self.register_buffer("codewords", torch.zeros(self.num_levels, self.size, input_size // self.num_levels))

    @property
    def codebook_sizes(self) -> list[int]:
        return [self.size] * self.num_levels

    def parts(self, xs: Tensor) -> Tensor:
        """Divide each embedding into L parts of width P = D / L: (B, D) -> float64 (L, B, P)."""
        return xs.double().view(len(xs), self.num_levels, -1).transpose(0, 1)

    def join(self, codes: Tensor) -> Tensor:
        """Return the vector that the codes of each item represent: (B, L) -> (B, D)."""
        return torch.cat([codewords[code] for codewords, code in zip(self.codewords, codes.T, strict=True)], dim=1)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.get_codes(xs)
        return self.join(codes), xs.new_zeros(()), codes

    def get_codes(self, xs: Tensor) -> Tensor:
        return torch.stack([nearest_exactly(part, codewords)
                            for part, codewords in zip(self.parts(xs), self.codewords, strict=True)], dim=1)

    def last_distances(self, xs: Tensor) -> Tensor:
        return distances_exactly(self.parts(xs)[-1], self.codewords[-1])

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        return {"loss_total": (forward_outputs[0] - original_xs).square().sum(dim=1).mean()}

    @torch.no_grad()
    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        for level, part in enumerate(self.parts(sample(xs, generator, self.max_rows)).to(xs.dtype)):
            self.codewords[level] = kmeans(part.contiguous(), self.size, self.iterations, generator).centroids
        return True
