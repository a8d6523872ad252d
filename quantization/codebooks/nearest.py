"""Search for the nearest codeword.

`nearest` is fast, for training. `nearest_exactly` is for semantic IDs: the code of a row is the same in every batch.
"""

import torch
from torch import Tensor

from common.precision import matmul_precision

# N rows, D width, K codewords

CHUNK_CELLS = 1 << 22  # maximum number of distances in memory at once
TIE = 1e-9             # relative tolerance: if two distances differ by less, the codewords are equally near
ROUNDING = 2.0 ** -24  # relative rounding error of float32


@matmul_precision("ieee")
def nearest(rows: Tensor, codewords: Tensor) -> Tensor:
    """Return the index of each row's nearest codeword: (N, D), (K, D) -> (N,).

    The distances are computed in the precision of the input, also inside `matmul_precision("tf32")`.
    """
    # For a row r and a codeword c, this is |r - c|^2 - |r|^2. |r|^2 is the same for every codeword.
    return torch.addmm(codewords.square().sum(dim=1), rows, codewords.T, alpha=-2.0).argmin(dim=1)


def nearest_exactly(rows: Tensor, codewords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return the index of each row's nearest codeword, computed in float64: (N, D), (K, D) -> (N,).

    offsets: (K,), numbers that are added to the squared distances before they are compared

    If several codewords are equally near, the function returns the first one. The result for a row does not depend on
    the other rows.
    """
    if not len(rows):
        return torch.zeros(0, dtype=torch.long, device=rows.device)
    chunk = max(1, CHUNK_CELLS // len(codewords))
    if rows.device.type != "cpu" or not _float32_is_exact():
        return torch.cat([_first_smallest(part, codewords, offsets) for part in rows.split(chunk)])
    # On the CPU, compute all rows in float32 first. Repeat in float64 only the rows for which a rounding error could
    # change the code. This is much faster and gives the same codes.
    codes, clear = map(torch.cat, zip(*(_clearly_smallest(part, codewords, offsets) for part in rows.split(chunk)),
                                      strict=True))
    unclear = (~clear).nonzero().squeeze(1)
    for part in unclear.split(chunk):
        codes[part] = _first_smallest(rows[part], codewords, offsets)
    return codes


def _float32_is_exact() -> bool:
    """Return whether float32 matrix products on the CPU are computed in full precision, which is the default."""
    # Unlike `get_float32_matmul_precision`, this value covers all ways to change the precision, and never raises.
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


def distances_exactly(rows: Tensor, codewords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return the squared distance from each row to each codeword, in float64: (N, D), (K, D) -> (N, K).

    offsets: (K,), numbers that are added to the squared distances
    """
    rows, codewords = rows.double(), codewords.double()
    bias = codewords.square().sum(dim=1) + (0.0 if offsets is None else offsets.double())
    return torch.addmm(bias, rows, codewords.T, alpha=-2.0) + rows.square().sum(dim=1, keepdim=True)


def _first_smallest(rows: Tensor, codewords: Tensor, offsets: Tensor | None) -> Tensor:
    distances = distances_exactly(rows, codewords, offsets)
    tie = TIE * (rows.double().square().sum(dim=1, keepdim=True) + distances.abs().amin(dim=1, keepdim=True))
    return (distances <= distances.amin(dim=1, keepdim=True) + tie).byte().argmax(dim=1)


def _clearly_smallest(rows: Tensor, codewords: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find the nearest codewords in float32, and mark the rows for which the result is certain.

    Return the codes (N,), and a bool (N,) that is True if rounding errors cannot have changed the code.
    """
    # A code is certain if all other distances are larger than the smallest distance by more than `margin`. For a row r
    # and a codeword c, the error of the inner product is at most (D + 2) ROUNDING |r| |c|, in any order of summation
    # (Higham 2002, section 3.1). The rest of the margin allows for the errors of the other sums, for the ties of
    # `_first_smallest` and for underflow.
    bias = codewords.double().square().sum(dim=1) + (0.0 if offsets is None else offsets.double())
    norm, max_norm = rows.float().norm(dim=1), codewords.float().norm(dim=1).max()
    max_bias = bias.abs().max().float()
    error = ROUNDING * (2 * (rows.shape[1] + 6) * norm * max_norm + 3 * max_bias)
    margin = 2 * error + 4 * TIE * (norm + max_norm).square() + TIE * max_bias + 1e-36
    distances = torch.addmm(bias.float(), rows.float(), codewords.float().T, alpha=-2.0)
    smallest, codes = distances.min(dim=1)
    return codes, (distances <= (smallest + margin).unsqueeze(1)).sum(dim=1) == 1


def directions(codewords: Tensor) -> Tensor:
    """Scale codewords (K, D) to length 1. The nearest codeword is then the one at the smallest angle."""
    return torch.nn.functional.normalize(codewords, dim=1)
