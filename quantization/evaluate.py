"""How good semantic IDs are: collisions, use of the codebooks, reconstruction."""

import math

import numpy as np
import torch
from torch import Tensor

from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import checked_codes

# N items, L levels


def evaluate(model: AbstractVQ, xs: Tensor, batch_size: int) -> tuple[dict, np.ndarray]:
    """The figures of a model over all items (N, D), and the codes (N, L) that it gives them."""
    codes, losses, errors = [], {}, []
    for batch in xs.split(batch_size):
        codes.append(checked_codes(model, batch))
        outputs = model(batch)
        for name, loss in model.compute_loss(outputs, batch).items():
            losses[name] = losses.get(name, 0.0) + loss.detach() * len(batch)
        if batch.is_floating_point() and outputs[0].shape == batch.shape:
            errors.append((outputs[0] - batch).square().sum(dim=1))
    table = torch.cat(codes).cpu().numpy()
    figures = {name: float(total) / len(xs) for name, total in losses.items()}
    if errors:
        figures["reconstruction_error"] = float(torch.cat(errors).mean())
    return figures | code_figures(table, model.codebook_sizes), table


def code_figures(codes: np.ndarray, codebook_sizes: list[int] | None) -> dict:
    """Figures of codes (N, L) alone. Sizes that a model does not state are read off the codes."""
    sizes = codebook_sizes or [int(level.max()) + 1 for level in codes.T]
    return {
        "collision_rate": collision_rate(codes),
        "largest_bucket": int(bucket_sizes(codes).max()),
        "utilization": [len(np.unique(level)) / size for level, size in zip(codes.T, sizes, strict=True)],
        "perplexity": [perplexity(level) for level in codes.T],
    }


def collision_rate(codes: np.ndarray) -> float:
    """1 - distinct IDs / items."""
    return 1.0 - len(np.unique(codes, axis=0)) / len(codes)


def bucket_sizes(codes: np.ndarray) -> np.ndarray:
    """How many items each distinct ID stands for."""
    return np.unique(codes, axis=0, return_counts=True)[1]


def perplexity(level: np.ndarray) -> float:
    """exp of the entropy of one level's codes: the number of codes in use, were they used alike."""
    share = np.unique(level, return_counts=True)[1] / len(level)
    return math.exp(-float(np.sum(share * np.log(share))))
