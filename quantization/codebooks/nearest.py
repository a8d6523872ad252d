"""Which codeword is the nearest: fast for training, and the same in every batch for semantic IDs."""

import torch
from torch import Tensor

# N rows, D width, K codewords

CHUNK_CELLS = 1 << 22  # distances held at once
TIE = 1e-9             # relative; codewords that are as near as makes no difference count as equally near
ROUNDING = 2.0 ** -24  # of a float32, relative


def nearest(rows: Tensor, codewords: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) index of the codeword at the smallest distance."""
    # |r - c|^2 without |r|^2, which is the same for every codeword.
    return torch.addmm(codewords.square().sum(dim=1), rows, codewords.T, alpha=-2.0).argmin(dim=1)


def nearest_exactly(rows: Tensor, codewords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Like `nearest`, in float64, and of equally near codewords the first: no other row can change a row's answer.

    With offsets (K,) it is the smallest squared distance plus offset. On the CPU float32 answers where its error cannot
    matter, which is faster by far and gives the same codes.
    """
    if not len(rows):
        return torch.zeros(0, dtype=torch.long, device=rows.device)
    chunk = max(1, CHUNK_CELLS // len(codewords))
    if rows.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        return torch.cat([_first_smallest(part, codewords, offsets) for part in rows.split(chunk)])
    codes, clear = map(torch.cat, zip(*(_clearly_smallest(part, codewords, offsets) for part in rows.split(chunk)),
                                      strict=True))
    unclear = (~clear).nonzero().squeeze(1)
    for part in unclear.split(chunk):
        codes[part] = _first_smallest(rows[part], codewords, offsets)
    return codes


def distances_exactly(rows: Tensor, codewords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """(N, D), (K, D) -> (N, K) squared distances plus offsets, float64."""
    rows, codewords = rows.double(), codewords.double()
    bias = codewords.square().sum(dim=1) + (0.0 if offsets is None else offsets.double())
    return torch.addmm(bias, rows, codewords.T, alpha=-2.0) + rows.square().sum(dim=1, keepdim=True)


def _first_smallest(rows: Tensor, codewords: Tensor, offsets: Tensor | None) -> Tensor:
    distances = distances_exactly(rows, codewords, offsets)
    tie = TIE * (rows.double().square().sum(dim=1, keepdim=True) + distances.abs().amin(dim=1, keepdim=True))
    return (distances <= distances.amin(dim=1, keepdim=True) + tie).byte().argmax(dim=1)


def _clearly_smallest(rows: Tensor, codewords: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (N,) by float32, and bool (N,): the nearest codeword is nearer than the next by more than any rounding.

    The error of an inner product of D numbers is at most D + 2 roundings of |r| |c|, in whatever order they are summed
    (Higham 2002, section 3.1); the rest of the bound is for sums, for the tie of `_first_smallest` and for underflow.
    """
    bias = codewords.double().square().sum(dim=1) + (0.0 if offsets is None else offsets.double())
    length, longest = rows.float().norm(dim=1), codewords.float().norm(dim=1).max()
    max_size = bias.abs().max().float()
    error = ROUNDING * (2 * (rows.shape[1] + 6) * length * longest + 3 * max_size)
    margin = 2 * error + 4 * TIE * (length + longest).square() + TIE * max_size + 1e-36
    distances = torch.addmm(bias.float(), rows.float(), codewords.float().T, alpha=-2.0)
    smallest, codes = distances.min(dim=1)
    return codes, (distances <= (smallest + margin).unsqueeze(1)).sum(dim=1) == 1


def directions(codewords: Tensor) -> Tensor:
    """(K, D) scaled to length 1, among which the nearest is the one at the smallest angle."""
    return torch.nn.functional.normalize(codewords, dim=1)
