"""What the files of this stage share: the contract with a model, and disambiguation."""

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.models.abstract_vq import AbstractVQ

# N items, L levels


def checked_codes(model: AbstractVQ, xs: Tensor) -> Tensor:
    """The model's codes for (B, D) as integers (B, L). Raises ConfigError that names the broken promise."""
    where = f"{type(model).__module__}.{type(model).__name__}.get_codes"
    codes = model.get_codes(xs)
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dtype == torch.bool:
        raise ConfigError(where, f"returned {getattr(codes, 'dtype', type(codes).__name__)}",
                          "codes are a tensor of integers", "return codes of shape (batch, levels)")
    if codes.ndim == 1:
        codes = codes.unsqueeze(1)
    if codes.ndim != 2 or len(codes) != len(xs):
        raise ConfigError(where, f"returned shape {tuple(codes.shape)} for {len(xs)} items",
                          fix="return codes of shape (batch, levels)")
    codes, sizes = codes.long(), model.codebook_sizes  # short integers would overflow where codes are counted
    limits = torch.tensor(sizes or [torch.iinfo(torch.int32).max] * codes.shape[1], device=codes.device)
    if len(limits) != codes.shape[1] or (codes < 0).any() or (codes >= limits).any():
        raise ConfigError(where, f"returned codes from {codes.amin(dim=0).tolist()} to {codes.amax(dim=0).tolist()}",
                          f"the sizes of the codebooks are {sizes}", "return codes from 0 to the codebook's size - 1")
    return codes


def disambiguate(codes: np.ndarray) -> np.ndarray:
    """Add a level that counts the items of equal codes, so that no two share an ID.

    (N, L) -> (N, L + 1), or the codes as they are where they are distinct already. The level's size
    is that of the largest bucket, exactly; within a bucket the items keep their order.
    """
    _, bucket, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    if counts.max() == 1:
        return codes
    bucket = bucket.reshape(-1)
    order = np.argsort(bucket, kind="stable")
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(starts, counts)
    return np.column_stack([codes, rank])
