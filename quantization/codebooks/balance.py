"""Use prices to limit the sizes of clusters.

Each row belongs to the cluster with the lowest cost plus price. If the price of a cluster rises, the cluster becomes
smaller.
"""

from itertools import pairwise

import torch
from torch import Tensor

# N rows, K clusters

FEW = 64  # `raise_prices` stops at this number of surplus rows; `exact_prices` moves the remaining ones one by one


def raise_prices(costs: Tensor, prices: Tensor, max_size: int, num_rounds: int) -> Tensor:
    """Raise the prices of full clusters until there are at most `FEW` surplus rows, and return the new prices (K,).

    costs: float64 (N, K), the cost of each row in each cluster
    prices: (K,), the prices to start from
    max_size: maximum number of rows in a cluster
    num_rounds: maximum number of rounds

    A full cluster has at least `max_size` rows. A cluster with n > max_size rows has n - max_size surplus rows.
    """
    # Each round raises the prices of all full clusters by the same amount, such that about `surplus` rows leave the
    # full clusters. If the prices were raised one cluster at a time, two full clusters would exchange rows in tiny
    # steps.
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
        # Raise the prices to the midpoint between the last row that leaves and the first row that stays.
        prices = torch.where(full, prices + (margins[surplus - 1] + margins[first_staying]) / 2, prices)
    return prices - prices.min()


def exact_prices(costs: Tensor, prices: Tensor, max_size: int) -> Tensor:
    """Return prices (K,) at which no cluster has more than `max_size` rows.

    costs: float64 (N, K), the cost of each row in each cluster
    prices: (K,), prices at which there are only a few surplus rows

    If no cluster exceeds `max_size` at the given prices, the function returns these prices. Otherwise, of all
    assignments that respect the limit, the new prices give the one with the lowest total cost. A cluster can still
    exceed `max_size` if some rows are equal or nearly equal.
    """
    # This is the dual of a transport problem, solved by successive shortest paths. Each surplus row starts a chain of
    # moves from cluster to cluster. The chain ends in a cluster that has room. Many prices give the same assignment.
    # Their mean has a margin: a small change of a cost does not change the assignment.
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
    """For each target cluster, return the lowest cost of moving one row from `cluster` to the target: (K,).

    The costs are infinite if `cluster` is empty.
    """
    inside = costs[codes == cluster]
    if not len(inside):
        return torch.full_like(costs[0], torch.inf)
    return (inside - inside[:, cluster, None]).amin(dim=0)


def _cheapest_row(costs: Tensor, codes: Tensor, source: int, target: int) -> int:
    """Return the index of the row that can move from `source` to `target` at the lowest cost."""
    inside = (codes == source).nonzero().squeeze(1)
    return int(inside[(costs[inside, target] - costs[inside, source]).argmin()])


def _cheapest_chain(moves: Tensor, prices: Tensor, counts: Tensor, max_size: int) -> tuple[list[int], Tensor]:
    """Find the cheapest chain of moves from a cluster that is too large to a cluster that has room.

    Return the clusters in the chain, and new prices (K,). At the new prices, the moves of the chain cost nothing.

    moves: (K, K), the lowest cost of moving one row from each cluster to each other cluster
    counts: (K,), the number of rows in each cluster
    """
    # Bellman-Ford on reduced costs: the cost of a move, plus the price of the target, minus the price of the source.
    # Reduced costs are clamped at 0, because rounding errors could create a cycle of negative cost.
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
    """Return prices (K,) at which every row prefers its own cluster, by a margin wherever possible.

    moves: (K, K), the lowest cost of moving one row from each cluster to each other cluster
    """
    # Prices p have a margin if p[j] - p[k] < moves[j, k] for all clusters j and k. Take any target cluster, and set
    # p[j] to the cost of the cheapest chain of moves from cluster j to the target (Floyd-Warshall). Then both sides are
    # equal along the chains. For the mean over all targets, both sides are equal only where a margin is impossible.
    chains = torch.where(moves.isfinite(), moves, len(moves) * moves[moves.isfinite()].abs().max())
    for cluster in range(len(moves)):
        chains = torch.minimum(chains, chains[:, cluster, None] + chains[cluster])
    prices = chains.mean(dim=1)
    return prices - prices.min()
