"""Finite scalar quantization, with digits worked out by hand."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.models.fsq import ResidualFSQ
from tests.errors import refused
from tests.quantization.conftest import seeded, shown


def quantizer_of(num_levels: int, num_values: list[int]) -> ResidualFSQ:
    return ResidualFSQ(num_levels, num_values).eval()


def latent_of(squashed: list[list[float]]) -> Tensor:
    """The latent that a quantizer squashes to these numbers before its start."""
    return torch.erfinv(torch.tensor(squashed, dtype=torch.float64)) * 2**0.5


def test_each_level_rounds_the_residual_of_one_number():
    quantizer = quantizer_of(3, [4])
    # The four parts of (-1, 1) have the middles -.75, -.25, .25, .75.
    # .9 is in the last part, .75; the residual 4 * .15 = .6 too; its residual 4 * (.6 - .75) = -.6 is in the first.
    # -.3 is in the second part; its residual 4 * -.05 = -.2 in the second; the next, 4 * .05 = .2, in the third.
    latent = latent_of([[0.9], [-0.3]])
    assert quantizer.get_codes(latent).tolist() == [[3, 3, 0], [1, 1, 2]]
    quantized = quantizer(latent).latent
    assert torch.allclose(quantized.flatten().float(), torch.tensor([0.75 + 0.75 / 4 - 0.75 / 16,
                                                                     -0.25 - 0.25 / 4 + 0.25 / 16]))


def test_the_first_number_of_a_code_counts_fastest():
    quantizer = quantizer_of(1, [3, 2])
    # Three parts end at -1/3 and 1/3; two at 0.
    assert quantizer.get_codes(latent_of([[-0.9, -0.5], [0.0, -0.5], [0.9, -0.5], [-0.9, 0.5], [0.0, 0.5],
                                          [0.9, 0.5]])).tolist() == [[0], [1], [2], [3], [4], [5]]
    assert quantizer.sizes == [6]


def test_values_far_outside_get_the_outermost_codes():
    quantizer = quantizer_of(2, [4, 4])
    assert quantizer.get_codes(torch.tensor([[100.0, 100.0], [-100.0, -100.0]])).tolist() == [[15, 15], [0, 0]]


def test_the_distances_to_the_last_levels_codes_by_hand():
    quantizer = quantizer_of(2, [2])
    # .75 is in the upper half with the middle .5; the residual 2 * .25 = .5 reaches the last level, values -.5 and .5.
    distances = quantizer.last_distances(latent_of([[0.75]]))
    assert torch.allclose(distances, torch.tensor([[1.0, 0.0]], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("num_values", [[4], [4, 4, 4, 4]])
def test_every_level_divides_the_error_by_num_values(num_values):
    squashed = torch.rand(5000, len(num_values), generator=seeded(), dtype=torch.float64) * 2 - 1
    latent = latent_of(squashed.tolist())
    for level in range(1, 4):
        error = (quantizer_of(level, num_values)(latent).latent - squashed).abs()
        assert error.max() <= 4.0**-level + 1e-9
        assert float(error.mean()) == pytest.approx(4.0**-level / 2, rel=0.05)


def test_all_codes_are_used_about_equally_often_after_the_start():
    quantizer = quantizer_of(1, [4, 4])
    latent = torch.randn(16_000, 2, generator=seeded()) * torch.tensor([0.01, 30.0]) + torch.tensor([5.0, -9.0])
    quantizer.start(latent, seeded())
    counts = torch.bincount(quantizer.get_codes(latent)[:, 0], minlength=16)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_the_gradient_is_that_of_the_squashing():
    quantizer = quantizer_of(2, [4, 4]).train()
    latent = torch.randn(20, 2, generator=seeded(), requires_grad=True)
    quantizer(latent).latent.sum().backward()
    ours, latent.grad = latent.grad, None
    torch.erf(latent / 2**0.5).sum().backward()
    assert torch.allclose(ours, latent.grad)


def test_there_is_no_quantization_loss(make_config, make_model, xs):
    model = make_model(make_config("fsq"))
    assert model(xs)[1].item() == 0.0
    assert model.codebook_sizes == [6, 6, 6]


@pytest.mark.parametrize("values", ["[]", "[4, 1]", "[4.0]", "[true, 4]", "4", "null", "[many]", "[2000, 2000]"])
def test_invalid_num_values_are_refused(make_config, make_model, values):
    with refused(ConfigError, "fsq.model_params.num_values", names=[shown(values)], fix=["--num_values ["]):
        make_model(make_config("fsq", num_values=values))


def test_many_levels_are_exact_in_float64():
    quantizer, values = quantizer_of(12, [7, 3]), torch.tensor([7, 3])
    squashed = torch.rand(500, 2, generator=seeded(), dtype=torch.float64) * 2 - 1
    # The digits of all levels are those of one number: the position in the interval, in base V.
    position = (torch.erf(latent_of(squashed.tolist()) / 2**0.5) + 1) / 2
    numbers = (position * values**12).floor().long()
    digits = [numbers // values ** (11 - level) % values for level in range(12)]
    codes = torch.stack([digit[:, 0] + 7 * digit[:, 1] for digit in digits], dim=1)
    assert (quantizer.get_codes(latent_of(squashed.tolist())) == codes).all(dim=1).float().mean() > 0.99
