"""Cluster prices that limit the size of clusters: each row goes to the cluster with the lowest cost plus price."""

from itertools import pairwise

import torch
from torch import Tensor

# N rows, K clusters

FEW = 64  # surplus rows at which `raise_prices` stops; `exact_prices` moves them one by one


def raise_prices(costs: Tensor, prices: Tensor, max_size: int, num_rounds: int) -> Tensor:
    """Raise the prices (K,) of full clusters until there are at most FEW surplus rows, in at most `num_rounds` rounds.

    costs: float64 (N, K)

    Surplus rows are the rows above `max_size` in each cluster. A round raises the prices of all full clusters by the
    same amount, just enough for as many rows to move to other clusters as there are surplus rows. If the prices were
    raised one at a time, two full clusters would outbid each other in tiny steps.
    """
    for _ in range(num_rounds):
        priced = costs + prices
        lowest, codes = priced.min(dim=1)
        counts = torch.bincount(codes, minlength=len(prices))
        surplus = int((counts - max_size).clamp(min=0).sum())
        if surplus <= FEW:
            break
        full = counts >= max_size
        in_full = full[codes]
        margins = (priced[in_full].masked_fill(full, torch.inf).amin(dim=1) - lowest[in_full]).sort().values
        first_staying = min(surplus, len(margins) - 1)
        # The midpoint between the last row that moves and the first row that stays.
        prices = torch.where(full, prices + (margins[surplus - 1] + margins[first_staying]) / 2, prices)
    return prices - prices.min()


def exact_prices(costs: Tensor, prices: Tensor, max_size: int) -> Tensor:
    """Return prices (K,) at which no cluster has more than `max_size` rows.

    costs: float64 (N, K)
    prices: (K,), prices at which clusters have only a few surplus rows

    The size-limited assignment with the lowest total cost is the cheapest assignment at some prices (the dual of the
    transport problem). It is found by successive shortest paths: each surplus row starts a chain of moves from cluster
    to cluster, which ends in a cluster that has room. Many prices give this assignment. The function returns the mean
    of the extreme ones, which keeps a margin to every other assignment. A cluster can exceed the limit only if some
    rows are equal or nearly equal.
    """
    codes = (costs + prices).argmin(dim=1)
    counts = torch.bincount(codes, minlength=len(prices))
    if not (counts > max_size).any():
        return prices
    costs = costs - costs.amin(dim=1, keepdim=True)  # smaller numbers have smaller rounding errors
    moves = torch.stack([_cheapest_moves(costs, codes, cluster) for cluster in range(len(prices))])
    while (counts > max_size).any():
        chain, prices = _cheapest_chain(moves, prices, counts, max_size)
        rows = [_cheapest_row(costs, codes, source, target) for source, target in pairwise(chain)]
        codes[rows] = torch.tensor(chain[1:], device=codes.device)
        counts = torch.bincount(codes, minlength=len(prices))
        for cluster in chain:
            moves[cluster] = _cheapest_moves(costs, codes, cluster)
    return _mean_of_extremes(moves)


def _cheapest_moves(costs: Tensor, codes: Tensor, cluster: int) -> Tensor:
    """Return the lowest cost of moving a row from `cluster` to each cluster: (K,), infinite if `cluster` is empty."""
    inside = costs[codes == cluster]
    if not len(inside):
        return torch.full_like(costs[0], torch.inf)
    return (inside - inside[:, cluster, None]).amin(dim=0)


def _cheapest_row(costs: Tensor, codes: Tensor, source: int, target: int) -> int:
    """Return the index of the row that can move from `source` to `target` at the lowest cost."""
    inside = (codes == source).nonzero().squeeze(1)
    return int(inside[(costs[inside, target] - costs[inside, source]).argmin()])


def _cheapest_chain(moves: Tensor, prices: Tensor, counts: Tensor, max_size: int) -> tuple[list[int], Tensor]:
    """Return the cheapest chain of clusters from an overfull one to one with room, and the new prices (K,).

    moves: (K, K), the lowest cost of a move from each cluster to each other

    At the new prices, the moves of the chain cost nothing. The algorithm is Bellman-Ford on the reduced costs, which
    are the costs of the moves plus the differences in price. They are clamped at 0, so that rounding cannot create a
    cycle of negative cost.
    """
    reduced_costs = (moves + prices - prices.unsqueeze(1)).clamp(min=0)
    total = torch.where(counts > max_size, 0.0, torch.inf).to(moves)
    previous = torch.full_like(counts, -1)
    while True:
        shorter, source = (total.unsqueeze(1) + reduced_costs).min(dim=0)
        better = shorter < total
        if not better.any():
            break
        total, previous = torch.where(better, shorter, total), torch.where(better, source, previous)
    least, end = total.masked_fill(counts >= max_size, torch.inf).min(dim=0)
    chain = [int(end)]
    while (cluster := int(previous[chain[-1]])) >= 0:
        chain.append(cluster)
    return chain[::-1], prices - total.clamp(max=least)


def _mean_of_extremes(moves: Tensor) -> Tensor:
    """Return prices p (K,) with p[j] - p[k] < moves[j, k] wherever possible.

    The costs of the cheapest chains of moves to any one cluster almost satisfy this condition: along the chains, the
    two sides are equal. In the mean over all clusters, they are equal only where they are equal in every solution. The
    Floyd-Warshall algorithm finds the chains.
    """
    chains = torch.where(moves.isfinite(), moves, len(moves) * moves[moves.isfinite()].abs().max())
    for cluster in range(len(moves)):
        chains = torch.minimum(chains, chains[:, cluster, None] + chains[cluster])
    prices = chains.mean(dim=1)
    return prices - prices.min()
