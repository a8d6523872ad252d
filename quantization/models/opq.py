"""Optimized product quantization (OPQ, Ge et al. 2013, CVPR)."""

import importlib.util

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.codebooks.layers import sample
from quantization.codebooks.sizes import at_least_one

from .pq import PQ


class OPQ(PQ):
    """Product quantization of rotated embeddings. faiss learns a rotation that minimizes the quantization error."""

    section = "opq"
    rotation: Tensor  # (D, D)

    def __init__(self, config: dict, input_size: int):
        super().__init__(config, input_size)
        params = config["opq"]["model_params"]
        self.rotation_iterations = at_least_one(params["rotation_iterations"], "opq.model_params.rotation_iterations")
        self.register_buffer("rotation", torch.eye(input_size))
        if importlib.util.find_spec("faiss") is None:
            raise ConfigError("opq", "needs faiss, which is not installed", "OPQ learns its rotation with faiss",
                              "run pip install -r requirements-faiss.txt, or use --quantizer_name pq")

    def parts(self, xs: Tensor) -> Tensor:
        return super().parts(xs.double() @ self.rotation.double().T)

    def join(self, codes: Tensor) -> Tensor:
        return super().join(codes) @ self.rotation

    @torch.no_grad()
    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        import faiss

        rows = sample(xs, generator, self.max_rows).cpu().numpy()
        num_rows = len(rows)
        if num_rows < rows.shape[1]:  # faiss crashes if there are fewer rows than columns
            rows = np.tile(rows, (-(-rows.shape[1] // num_rows), 1))
        transform = faiss.OPQMatrix(rows.shape[1], self.num_levels)
        transform.niter = self.rotation_iterations
        # faiss needs a codebook size that is a power of two, at least 2, and at most the number of rows.
        num_bits = max(1, min(self.size, num_rows).bit_length() - 1)
        transform.pq = faiss.ProductQuantizer(rows.shape[1], self.num_levels, num_bits)
        transform.pq.cp.min_points_per_centroid = 1  # otherwise, faiss prints a warning per part and iteration
        transform.train(rows)
        matrix = torch.from_numpy(faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in).copy())
        self.rotation.copy_(matrix)
        return super().fit(xs, generator)
