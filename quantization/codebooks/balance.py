"""Prices for a place in a cluster, such that no cluster is overfull when every row goes where it is cheapest."""

from itertools import pairwise

import torch
from torch import Tensor

# N rows, K clusters

FEW = 64  # rows too many, from which on the cheapest way out is looked for, row by row


def raise_prices(costs: Tensor, prices: Tensor, max_size: int, num_rounds: int) -> Tensor:
    """Raise the prices (K,) of full clusters until few rows are too many somewhere. costs: float64 (N, K).

    All clusters without room are raised alike, until as many rows have left them for others as are too many: those that
    lose least by it. (Raised one by one, two full clusters would outbid each other in tiny steps.)
    """
    for _ in range(num_rounds):
        priced = costs + prices
        own, codes = priced.min(dim=1)
        counts = torch.bincount(codes, minlength=len(prices))
        surplus = int((counts - max_size).clamp(min=0).sum())
        if surplus <= FEW:
            break
        full = counts >= max_size
        leaving = full[codes]
        margins = (priced[leaving].masked_fill(full, torch.inf).amin(dim=1) - own[leaving]).sort().values
        stays = min(surplus, len(margins) - 1)
        # Between the last that leaves and the first that stays.
        prices = torch.where(full, prices + (margins[surplus - 1] + margins[stays]) / 2, prices)
    return prices - prices.min()


def exact_prices(costs: Tensor, prices: Tensor, max_size: int) -> Tensor:
    """Prices (K,) with which the nearest cluster of every row has room for it, from prices that nearly do that.

    The assignment of least total cost under such a limit is the cheapest one at some prices (the dual of the transport
    problem). It is found by successive shortest paths: a row that is too many starts a chain of moves from cluster
    to cluster, to one that has room. Of all prices that fit, the mean of the extreme ones is taken, which
    is far from every other assignment. Only rows that are equal, or nearly so, can still be too many together.
    """
    codes = (costs + prices).argmin(dim=1)
    counts = torch.bincount(codes, minlength=len(prices))
    if not (counts > max_size).any():
        return prices
    costs = costs - costs.amin(dim=1, keepdim=True)  # in numbers as small as the differences that matter
    moves = torch.stack([_cheapest_moves(costs, codes, cluster) for cluster in range(len(prices))])
    while (counts > max_size).any():
        chain, prices = _cheapest_chain(moves, prices, counts, max_size)
        rows = [_row_that_moves(costs, codes, source, target) for source, target in pairwise(chain)]
        codes[rows] = torch.tensor(chain[1:], device=codes.device)
        counts = torch.bincount(codes, minlength=len(prices))
        for cluster in chain:
            moves[cluster] = _cheapest_moves(costs, codes, cluster)
    return _mean_of_extremes(moves)


def _cheapest_moves(costs: Tensor, codes: Tensor, cluster: int) -> Tensor:
    """(K,) what it costs at least to move a row from this cluster to each; infinite if it has none."""
    inside = costs[codes == cluster]
    if not len(inside):
        return torch.full_like(costs[0], torch.inf)
    return (inside - inside[:, cluster, None]).amin(dim=0)


def _row_that_moves(costs: Tensor, codes: Tensor, source: int, target: int) -> int:
    inside = (codes == source).nonzero().squeeze(1)
    return int(inside[(costs[inside, target] - costs[inside, source]).argmin()])


def _cheapest_chain(moves: Tensor, prices: Tensor, counts: Tensor, max_size: int) -> tuple[list[int], Tensor]:
    """Clusters from an overfull one to one with room, along moves (K, K); and the prices (K,) that make it the nearest.

    Bellman and Ford's algorithm on what a move costs above the difference in prices. That is never less than nothing,
    so that no circle of moves can look like a gain by rounding.
    """
    above = (moves + prices - prices.unsqueeze(1)).clamp(min=0)
    total = torch.where(counts > max_size, 0.0, torch.inf).to(moves)
    before = torch.full_like(counts, -1)
    while True:
        shorter, source = (total.unsqueeze(1) + above).min(dim=0)
        better = shorter < total
        if not better.any():
            break
        total, before = torch.where(better, shorter, total), torch.where(better, source, before)
    least, end = total.masked_fill(counts >= max_size, torch.inf).min(dim=0)
    chain = [int(end)]
    while (cluster := int(before[chain[-1]])) >= 0:
        chain.append(cluster)
    return chain[::-1], prices - total.clamp(max=least)


def _mean_of_extremes(moves: Tensor) -> Tensor:
    """(K,) prices p with p_k - p_j < moves (K, K) wherever that is possible.

    The cheapest chains to any one cluster are such prices, but for equality along the chains; their mean over all
    clusters is equal only where every solution is. Floyd and Warshall's algorithm.
    """
    chains = torch.where(moves.isfinite(), moves, len(moves) * moves[moves.isfinite()].abs().max())
    for cluster in range(len(moves)):
        chains = torch.minimum(chains, chains[:, cluster, None] + chains[cluster])
    prices = chains.mean(dim=1)
    return prices - prices.min()
