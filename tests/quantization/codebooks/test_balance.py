"""Prices that keep clusters within a limit, against SciPy's assignment."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from quantization.codebooks.balance import exact_prices, raise_prices
from tests.quantization.conftest import seeded


def counts_at(costs, prices):
    return torch.bincount((costs + prices).argmin(dim=1), minlength=costs.shape[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_rows", "num_clusters", "max_size"), [(60, 6, 10), (60, 6, 12), (61, 7, 9), (5, 9, 1)])
def test_exact_prices_give_the_assignment_of_least_cost(seed, num_rows, num_clusters, max_size):
    costs = torch.rand(num_rows, num_clusters, generator=seeded(seed), dtype=torch.float64)
    costs[:, 0] -= 0.5  # so that most rows prefer the same cluster
    codes = (costs + exact_prices(costs, torch.zeros(num_clusters, dtype=torch.float64), max_size)).argmin(dim=1)
    assert torch.bincount(codes).max() <= max_size
    places = costs.repeat_interleave(max_size, dim=1)
    rows, columns = linear_sum_assignment(places.numpy())
    assert float(costs[range(num_rows), codes].sum()) == pytest.approx(float(places[rows, columns].sum()), rel=1e-9)


def test_the_prices_are_halfway_to_the_next_assignment():
    # The first cluster has room for one of the two rows; the second row loses less (3) by leaving than the first (5).
    prices = exact_prices(torch.tensor([[0.0, 5.0], [0.0, 3.0]], dtype=torch.float64), torch.zeros(2).double(), 1)
    assert float(prices[0] - prices[1]) == pytest.approx(4.0)


def test_prices_that_fit_do_not_change():
    prices = torch.tensor([0.25, 0.0], dtype=torch.float64)
    assert torch.equal(exact_prices(torch.eye(2, dtype=torch.float64), prices, 1), prices)


def test_raised_prices_leave_few_rows_above_the_limit():
    costs = torch.rand(2000, 10, generator=seeded(), dtype=torch.float64) - torch.arange(10) * 0.05
    raised = raise_prices(costs, torch.zeros(10, dtype=torch.float64), 210, 100)
    assert int((counts_at(costs, torch.zeros(10)) - 210).clamp(min=0).sum()) > 500
    assert int((counts_at(costs, raised) - 210).clamp(min=0).sum()) <= 64
    assert counts_at(costs, exact_prices(costs, raised, 210)).max() <= 210
