"""The baseline: distinct random codes."""

import pytest
import torch

from common.errors import ConfigError
from tests.errors import refused
from tests.quantization.conftest import numbers, seeded


@pytest.fixture
def codes_of(make_config, make_model):
    """number of items, seed, key=value, ... -> their codes."""
    def codes(num_items: int, seed: int = 0, **own):
        model = make_model(make_config("random", **own), num_items)
        items = torch.arange(num_items).unsqueeze(1)
        assert model.fit(items, seeded(seed))
        return model.get_codes(items)

    return codes


@pytest.mark.parametrize(("num_items", "size", "num_levels"), [
    (16, 4, 2), (15, 4, 2), (27, 3, 3), (7, 2, 3),  # just enough IDs
    (100, 8, 3), (1000, 32, 3), (60, 16, 2),
    (1, 1, 1), (40, 40, 1)])
def test_no_two_items_share_an_id(codes_of, num_items, size, num_levels):
    codes = codes_of(num_items, codebook_size=size, num_levels=num_levels)
    assert codes.shape == (num_items, num_levels)
    assert len(codes.unique(dim=0)) == num_items
    assert codes.min() >= 0
    assert codes.max() < size


def test_codes_are_a_function_of_the_seed(codes_of):
    assert torch.equal(codes_of(40), codes_of(40))
    assert not torch.equal(codes_of(40), codes_of(40, seed=1))


@pytest.mark.parametrize(("size", "num_levels"), [(16, 3), (11, 3)])
def test_codes_are_equally_frequent_and_independent_of_their_neighbours(codes_of, size, num_levels):
    codes = codes_of(1000, codebook_size=size, num_levels=num_levels)
    for level in codes.T:
        assert torch.bincount(level, minlength=size).max() < 1.5 * 1000 / size
    same = (codes[1:] == codes[:-1]).float().mean()
    assert float(same) == pytest.approx(1 / size, abs=0.03)


@pytest.mark.parametrize(("num_items", "size", "num_levels", "needed"), [
    (17, 4, 2, 3), (65, 4, 2, 4), (125, 5, 2, 3), (1000, 10, 2, 3), (243, 3, 1, 5)])
def test_too_few_ids_are_refused_with_the_needed_levels(codes_of, num_items, size, num_levels, needed):
    with refused(ConfigError, "random.model_params.num_levels", fix=["--num_levels"]) as raised:
        codes_of(num_items, codebook_size=size, num_levels=num_levels)
    told = {num_levels, size, size**num_levels, num_items}
    assert set(map(str, told)) <= set(numbers(f"{raised.value.what} {raised.value.why}"))
    assert numbers(raised.value.fix) == [str(needed)]


def test_levels_are_not_suggested_for_codebooks_of_one_code(codes_of):
    with refused(ConfigError, "random.model_params.num_levels", names=[3, 1, 40], fix=["--codebook_size auto"]):
        codes_of(40, codebook_size=1)
