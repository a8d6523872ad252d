"""MLP, standardizer, and passes in float64."""

import pytest
import torch
from torch import nn

from quantization.codebooks.layers import MLP, Standardizer, in_float64
from tests.quantization.conftest import seeded


def test_mlp_has_relu_only_between_its_layers():
    mlp = MLP([1, 2, 1])
    with torch.no_grad():
        mlp[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        mlp[2].weight.copy_(torch.tensor([[-2.0, -5.0]]))
        mlp[0].bias.zero_()
        mlp[2].bias.zero_()
    assert mlp(torch.tensor([[3.0], [-1.0]])).tolist() == [[-6.0], [-5.0]]  # -2 * relu(3), -5 * relu(1)


def test_mlp_of_one_layer_is_linear():
    assert len(MLP([3, 2])) == 1


def test_standardized_columns_have_mean_0_and_deviation_1():
    standardizer = Standardizer(3, active=True)
    xs = torch.tensor([[1.0, 5.0, -100.1], [3.0, 5.0, -100.1], [1.0, 5.0, -100.1], [3.0, 5.0, -100.1]])
    assert torch.equal(standardizer(xs), xs)  # not measured yet
    standardizer.measure(xs)
    assert standardizer(xs).tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert torch.allclose(standardizer.undo(standardizer(xs)), xs)
    assert standardizer(torch.tensor([[5.0, 6.0, -100.1]])).tolist() == [[3.0, 1.0, 0.0]]


def test_an_inactive_standardizer_changes_nothing():
    standardizer = Standardizer(2, active=False)
    xs = torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    standardizer.measure(xs)
    assert torch.equal(standardizer(xs), xs)
    assert torch.equal(standardizer.undo(xs), xs)


def test_exactly_runs_the_same_layers_in_float64():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    xs = torch.randn(5, 3, generator=seeded())
    exact = in_float64(module, xs)
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.float(), module(xs), atol=1e-6)
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(exact, module.double()(xs.double()))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_an_exact_pass_does_not_depend_on_the_batch(offset):
    mlp = MLP([16, 32, 8])
    xs = torch.randn(300, 16, generator=seeded()) + offset
    together, alone = in_float64(mlp, xs), torch.cat([in_float64(mlp, row) for row in xs.split(1)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12 * (1 + offset))
