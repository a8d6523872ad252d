"""The contract on codes, and disambiguation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import ConfigError
from quantization.utils import checked_codes, disambiguate

code_arrays = arrays.arrays(
    st.sampled_from([np.int64, np.int32, np.uint8]), st.tuples(st.integers(1, 40), st.integers(1, 4)),
    elements=st.integers(0, 3))


def test_disambiguation_counts_items_of_equal_codes_in_their_order():
    codes = np.array([[1, 2], [0, 0], [1, 2], [3, 3], [1, 2], [0, 0]])
    assert disambiguate(codes).tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [3, 3, 0], [1, 2, 2], [0, 0, 1]]


def test_distinct_codes_stay_as_they_are():
    codes = np.array([[1, 2], [2, 1], [0, 0]])
    assert disambiguate(codes).tolist() == [[1, 2], [2, 1], [0, 0]]


def test_codes_that_differ_in_one_level_alone_are_distinct():
    codes = np.array([[1, 2, 3], [1, 2, 4], [0, 2, 3]])
    assert disambiguate(codes).shape == (3, 3)


def test_the_extra_level_is_larger_than_any_codebook_where_it_must_be():
    codes = np.zeros((1000, 2), dtype=np.int64)
    assert disambiguate(codes)[:, -1].tolist() == list(range(1000))


def test_a_bucket_may_outgrow_the_integers_that_hold_the_codes():
    codes = np.zeros((300, 1), dtype=np.uint8)
    assert disambiguate(codes)[:, -1].tolist() == list(range(300))


@given(code_arrays)
def test_disambiguated_codes_are_distinct_and_keep_the_given_levels(codes):
    result = disambiguate(codes)
    assert len({tuple(row) for row in result.tolist()}) == len(codes)
    assert result[:, :codes.shape[1]].tolist() == codes.tolist()


@given(code_arrays)
def test_the_extra_level_is_exactly_as_large_as_the_largest_bucket(codes):
    rows = [tuple(row) for row in codes.tolist()]
    largest = max(rows.count(row) for row in rows)
    result = disambiguate(codes)
    if largest == 1:
        assert result.shape == codes.shape
    else:
        assert sorted(set(result[:, -1].tolist())) == list(range(largest))


@given(code_arrays)
def test_within_a_bucket_the_items_keep_their_order(codes):
    seen: dict[tuple, int] = {}
    result = disambiguate(codes)
    for row, extended in zip(codes.tolist(), result.tolist(), strict=True):
        if result.shape[1] > codes.shape[1]:
            assert extended[-1] == seen.get(tuple(row), 0)
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1


class Stub:
    """A quantizer that gives the codes it was made with."""

    def __init__(self, codes, codebook_sizes=None):
        self.codes, self.codebook_sizes = codes, codebook_sizes

    def get_codes(self, xs):
        return self.codes


XS = torch.zeros(3, 2)


def test_codes_pass_the_check_as_they_are():
    codes = torch.tensor([[0, 1], [1, 1], [2, 0]])
    assert torch.equal(checked_codes(Stub(codes, [3, 2]), XS), codes)


def test_a_vector_of_codes_is_one_level():
    assert checked_codes(Stub(torch.tensor([2, 0, 1])), XS).tolist() == [[2], [0], [1]]


def test_short_integers_become_long_ones():
    assert checked_codes(Stub(torch.zeros(3, 2, dtype=torch.uint8)), XS).dtype == torch.int64


@pytest.mark.parametrize(("codes", "message"), [
    (torch.zeros(3, 2), "float32"), (torch.zeros(3, 2, dtype=torch.bool), "bool"), ([[0], [1], [2]], "list")])
def test_codes_that_are_no_integers_are_an_error(codes, message):
    with pytest.raises(ConfigError, match=message):
        checked_codes(Stub(codes), XS)


@pytest.mark.parametrize("shape", [(2, 2), (4,), (3, 2, 1), ()])
def test_codes_of_another_shape_are_an_error_with_the_shape(shape):
    with pytest.raises(ConfigError, match=r"Stub.get_codes: returned shape .* for 3 items"):
        checked_codes(Stub(torch.zeros(shape, dtype=torch.int64)), XS)


@pytest.mark.parametrize(("codes", "sizes"), [
    ([[0, -1], [1, 1], [2, 0]], None),
    ([[0, 1], [1, 1], [3, 0]], [3, 2]),
    ([[0, 1], [1, 1], [2, 0]], [3]),
])
def test_codes_outside_the_codebooks_are_an_error(codes, sizes):
    with pytest.raises(ConfigError, match="codebook"):
        checked_codes(Stub(torch.tensor(codes), sizes), XS)
