"""Residual k-means: levels, lengths, standardization and the limit to the size of clusters."""

import pytest
import torch

from common.errors import ConfigError
from tests.errors import refused
from tests.quantization.conftest import seeded, shown


@pytest.fixture
def fitted(make_config, make_model):
    """xs, key=value, ... -> the rkmeans fitted to them."""
    def fit(xs, **own):
        plain = {"normalize_residuals": "false", "largest_cluster": "null", "iterations": 20}
        model = make_model(make_config("rkmeans", **plain | own), len(xs))
        for name in ("mean", "deviation"):  # as wide as the items of the test
            model.standardizer.register_buffer(name, torch.full((xs.shape[1],), float(name == "deviation")))
        model.codewords = torch.zeros(*model.codewords.shape[:2], xs.shape[1])
        assert model.fit(xs, seeded())
        return model.eval()

    return fit


def test_the_second_level_codes_the_residual_of_the_first(fitted):
    # Two distant groups around (-10, 0) and (10, 0); the residuals are (0, -1) and (0, 1).
    xs = torch.tensor([[-10.0, -1.0], [-10.0, 1.0], [10.0, -1.0], [10.0, 1.0]])
    model = fitted(xs, num_levels=2, codebook_size=2)
    assert sorted(model.codewords[0].tolist()) == [[-10.0, 0.0], [10.0, 0.0]]
    assert sorted(model.codewords[1].tolist()) == [[0.0, -1.0], [0.0, 1.0]]
    codes = model.get_codes(xs)
    assert len(codes.unique(dim=0)) == 4
    assert (codes[0, 0] == codes[1, 0], codes[0, 1] == codes[2, 1]) == (True, True)
    assert torch.allclose(model(xs)[0], xs)


def test_normalized_levels_code_directions_and_reconstruct_mean_lengths(fitted):
    # Directions (.96, +-.28) and (-.96, +-.28) with lengths 1 to 7, 4 in the mean. The first level's codewords are
    # (+-.96, 0), those of the second the directions (0, +-1) of the residuals, whose length is .28.
    directions = torch.tensor([[0.96, 0.28], [0.96, -0.28], [-0.96, 0.28], [-0.96, -0.28]])
    xs = directions * torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    model = fitted(xs, num_levels=2, codebook_size=2, normalize_residuals="true")
    first, second = (codewords[codewords.sum(dim=1).argsort()] for codewords in model.codewords)
    assert torch.allclose(first, torch.tensor([[-0.96, 0.0], [0.96, 0.0]]), atol=1e-6)
    assert torch.allclose(second, torch.tensor([[0.0, -1.0], [0.0, 1.0]]), atol=1e-6)
    assert torch.allclose(model.lengths, torch.tensor([4.0, 0.28]))
    assert torch.allclose(model(xs)[0], 4 * directions, atol=1e-5)


def test_a_standardized_column_counts_as_much_as_the_others(fitted):
    # The two groups of items differ in the first column; the second column is wider, but unrelated to the groups.
    xs = torch.tensor([[side, 100.0 * place] for place in range(5) for side in (-1.0, 1.0)])
    model = fitted(xs, num_levels=1, codebook_size=2)
    assert (model.codewords[0, 0, 1] - model.codewords[0, 1, 1]).abs() > 200
    model = fitted(xs, num_levels=1, codebook_size=2, standardize="true")
    assert torch.allclose(model.codewords[0, :, 1], torch.zeros(2), atol=1e-6)
    assert torch.allclose(model(xs)[0], torch.tensor([[-1.0, 200.0], [1.0, 200.0]]).repeat(5, 1))


def test_every_level_lowers_the_error(make_config, make_model):
    xs = torch.randn(500, 6, generator=seeded(1))
    errors = []
    for num_levels in (1, 2, 3):
        model = make_model(make_config("rkmeans", num_levels=num_levels, codebook_size=32, normalize_residuals="false",
                                       largest_cluster="null"), 500)
        model.fit(xs, seeded())
        errors.append(float(model.compute_loss(model(xs), xs)["loss_total"]))
    assert errors[0] < 0.5 * float(xs.square().sum(dim=1).mean())
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("normalized", ["true", "false"])
def test_the_cluster_limit_holds_for_single_lookups(make_config, make_model, normalized):
    xs = torch.randn(320, 6, generator=seeded(1)) + torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    model = make_model(make_config("rkmeans", num_levels=2, codebook_size=16, normalize_residuals=normalized,
                                   largest_cluster=1.5), 320)
    model.fit(xs, seeded())
    codes = torch.cat([model.get_codes(item) for item in xs.split(1)])
    assert [int(torch.bincount(level).max()) <= 30 for level in codes.T] == [True, True]


def test_without_a_limit_a_cluster_may_be_larger(fitted):
    far = torch.tensor([[50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    xs = torch.cat([torch.randn(90, 2, generator=seeded()) * 0.1, far])
    assert torch.bincount(fitted(xs, num_levels=1, codebook_size=4).get_codes(xs)[:, 0]).max() == 90


def test_one_codeword_with_a_limit(fitted):
    xs = torch.randn(10, 2, generator=seeded())
    assert fitted(xs, codebook_size=1, largest_cluster=1).get_codes(xs).unique().tolist() == [0]


def test_all_items_are_coded_if_kmeans_samples_rows(fitted):
    xs = torch.randn(100, 2, generator=seeded())
    model = fitted(xs, codebook_size=4, max_rows=4, num_levels=1)
    assert all(codeword in xs.tolist() for codeword in model.codewords[0].tolist())
    assert torch.bincount(model.get_codes(xs)[:, 0]).sum() == 100


@pytest.mark.parametrize("value", ["0.5", "0", "-1", "much", "[2]"])
def test_a_limit_below_the_equal_share_is_refused(make_config, make_model, value):
    with refused(ConfigError, "rkmeans.model_params.largest_cluster", names=[shown(value), 1]):
        make_model(make_config("rkmeans", largest_cluster=value))


@pytest.mark.parametrize("key", ["iterations", "max_rows"])
def test_a_count_of_zero_is_refused(make_config, make_model, key):
    with refused(ConfigError, names=[f"rkmeans.model_params.{key}", 0]):
        make_model(make_config("rkmeans", **{key: 0}))
