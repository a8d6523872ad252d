"""Optimized product quantization (OPQ, Ge et al. 2013, CVPR)."""

import math

import torch
from torch import Tensor

from common.precision import matmul_precision
from quantization.codebooks.kmeans import kmeans
from quantization.codebooks.layers import sample
from quantization.codebooks.nearest import nearest
from quantization.codebooks.sizes import at_least_one

from .pq import PQ

# N rows, D input width, L levels (parts), P part width, K codebook size

FIRST_ITERATIONS = 10  # k-means iterations before the first rotation; before each later one, there is one
NEGLIGIBLE = 1e-9      # variances are at least this share of the largest one, so that their product is not 0


class OPQ(PQ):
    """Product quantization of rotated embeddings. The rotation is learned, so that the quantization error is small."""

    section = "opq"
    rotation: Tensor  # (D, D)

    def __init__(self, config: dict, input_size: int):
        super().__init__(config, input_size)
        params = config["opq"]["model_params"]
        self.rotation_iterations = at_least_one(params["rotation_iterations"], "opq.model_params.rotation_iterations")
        self.first_rotation = params["first_rotation"]
        self.register_buffer("rotation", torch.eye(input_size))

    def parts(self, xs: Tensor) -> Tensor:
        return super().parts(xs.double() @ self.rotation.double().T)

    def join(self, codes: Tensor) -> Tensor:
        return super().join(codes) @ self.rotation

    @torch.no_grad()
    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        self.rotation.copy_(self._learn_rotation(sample(xs, generator, self.max_rows), generator))
        return super().fit(xs, generator)

    @matmul_precision("ieee")
    def _learn_rotation(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rotation (D, D) for rows (N, D).

        Two steps take turns: fit codewords to the rotated rows, then rotate the rows towards their codewords.
        """
        rotation = (balanced_components(rows, self.num_levels) if self.first_rotation == "components" else
                    random_rotation(rows.shape[1], generator).to(rows))
        codewords: list[Tensor | None] = [None] * self.num_levels
        for turn in range(self.rotation_iterations):
            quantized = []
            for level, part in enumerate((rows @ rotation.T).chunk(self.num_levels, dim=1)):
                iterations = 1 if turn else FIRST_ITERATIONS
                found = kmeans(part.contiguous(), self.size, iterations, generator, start=codewords[level]).centroids
                codewords[level] = found
                quantized.append(found[nearest(part, found)])
            # Orthogonal Procrustes problem: the rotation with the smallest sum of |rotation @ row - quantized row|^2.
            left, _, right = torch.linalg.svd((torch.cat(quantized, dim=1).T @ rows).double())
            rotation = (left @ right).to(rows)
        return rotation


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, in float64: (width, width)."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q


def balanced_components(rows: Tensor, num_parts: int) -> Tensor:
    """Return the principal components of rows (N, D) as a rotation (D, D) with parts of similar variance.

    Ge et al. call this eigenvalue allocation. From the largest variance to the smallest, each component goes to the
    part with the smallest product of variances so far, among the parts with less than D / num_parts components.
    """
    centred = (rows - rows.mean(dim=0)).double()
    variances, components = torch.linalg.eigh(centred.T @ centred)  # the largest variance is the last
    shares = variances / variances[-1].clamp(min=torch.finfo(torch.float64).tiny)
    logarithms = (shares.clamp(min=NEGLIGIBLE).log() - math.log(NEGLIGIBLE)).tolist()
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    products = [0.0] * num_parts  # as logarithms
    for component in reversed(range(len(logarithms))):
        part = min((part for part in range(num_parts) if len(parts[part]) < len(logarithms) // num_parts),
                   key=products.__getitem__)
        parts[part].append(component)
        products[part] += logarithms[component]
    return components.T[torch.tensor(parts, device=rows.device).flatten()].to(rows)
