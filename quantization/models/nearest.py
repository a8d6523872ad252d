"""Which codeword is the nearest: fast for training, and the same in every batch for semantic IDs."""

import torch
from torch import Tensor

# N rows, D width, K codewords

CHUNK_CELLS = 1 << 22  # distances held at once
TIE = 1e-9             # relative; codewords that are as near as makes no difference count as equally near


def nearest(rows: Tensor, codewords: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) index of the codeword at the smallest distance."""
    # |r - c|^2 without |r|^2, which is the same for every codeword.
    return torch.addmm(codewords.square().sum(dim=1), rows, codewords.T, alpha=-2.0).argmin(dim=1)


def nearest_exactly(rows: Tensor, codewords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Like `nearest`, in float64, and of equally near codewords the first: no other row can change a row's answer.

    With offsets (K,) it is the smallest squared distance plus offset.
    """
    rows, codewords = rows.double(), codewords.double()
    if not len(rows):
        return torch.zeros(0, dtype=torch.long, device=rows.device)
    chunk = max(1, CHUNK_CELLS // len(codewords))
    return torch.cat([_first_smallest(distances_exactly(part, codewords, offsets), part) for part in rows.split(chunk)])


def distances_exactly(rows: Tensor, codewords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """(N, D), (K, D) -> (N, K) squared distances plus offsets, float64."""
    rows, codewords = rows.double(), codewords.double()
    bias = codewords.square().sum(dim=1) + (0.0 if offsets is None else offsets.double())
    return torch.addmm(bias, rows, codewords.T, alpha=-2.0) + rows.square().sum(dim=1, keepdim=True)


def _first_smallest(distances: Tensor, rows: Tensor) -> Tensor:
    tie = TIE * (rows.square().sum(dim=1, keepdim=True) + distances.abs().amin(dim=1, keepdim=True))
    return (distances <= distances.amin(dim=1, keepdim=True) + tie).byte().argmax(dim=1)


def directions(codewords: Tensor) -> Tensor:
    """(K, D) scaled to length 1, among which the nearest is the one at the smallest angle."""
    return torch.nn.functional.normalize(codewords, dim=1)
