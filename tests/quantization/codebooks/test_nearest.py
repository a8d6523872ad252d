"""The nearest codeword, fast and exact."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise_distances, pairwise_distances_argmin

from quantization.codebooks import nearest as module
from quantization.codebooks.nearest import directions, distances_exactly, nearest, nearest_exactly
from tests.quantization.conftest import seeded

BOTH = pytest.mark.parametrize("find", [nearest, nearest_exactly])


@BOTH
def test_nearest_agrees_with_scikit_learn(find):
    rng = np.random.default_rng(0)
    rows, codewords = rng.normal(size=(200, 5)).astype(np.float32), rng.normal(size=(17, 5)).astype(np.float32)
    assert np.array_equal(find(torch.from_numpy(rows), torch.from_numpy(codewords)).numpy(),
                          pairwise_distances_argmin(rows, codewords))


def test_an_offset_is_added_to_the_squared_distance():
    rows, codewords = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.0], [4.0]])
    # Squared distances to the second: 16, 9, 4, 1; to the first 0, 1, 4, 9, and 5 more.
    assert nearest_exactly(rows, codewords, torch.tensor([5.0, 0.0])).tolist() == [0, 0, 1, 1]
    assert nearest_exactly(rows, codewords, torch.tensor([0.0, -20.0])).tolist() == [1, 1, 1, 1]


def test_of_equally_near_codewords_the_first_is_taken():
    codewords = torch.tensor([[9.0, 9.0], [0.1, 0.3], [0.3, 0.1], [0.1, 0.3]])
    rows = torch.tensor([[0.7, 0.7], [0.1, 0.3], [-5.0, -5.0]])
    assert nearest_exactly(rows, codewords).tolist() == [1, 1, 1]
    assert nearest_exactly(rows, codewords.flip(0)).tolist() == [0, 0, 0]


def test_a_difference_beyond_rounding_counts():
    codewords = torch.tensor([[1.0 + 1e-6], [-1.0]], dtype=torch.float64)
    assert nearest_exactly(torch.zeros(1, 1), codewords).tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e-3, 1.0, 1e6, 1e19, 1e25])  # the squares under- and overflow
@pytest.mark.parametrize("apart", [1e-9, 1e-6, 1e-4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clear_float32_answers_equal_those_of_float64(scale, apart, dtype):
    middle = torch.randn(1, 48, generator=seeded(0), dtype=torch.float64)
    codewords = scale * (middle + apart * torch.randn(40, 48, generator=seeded(1), dtype=torch.float64)).to(dtype)
    rows = scale * (middle + apart * torch.randn(500, 48, generator=seeded(2), dtype=torch.float64)).to(dtype)
    for offsets in (None, scale**2 * apart * torch.rand(40, generator=seeded(3), dtype=torch.float64)):
        exact = module._first_smallest(rows, codewords, offsets)
        codes, clear = module._clearly_smallest(rows, codewords, offsets)
        assert torch.equal(codes[clear], exact[clear])
        assert torch.equal(nearest_exactly(rows, codewords, offsets), exact)
    if (scale, apart) == (1.0, 1.0):
        assert clear.float().mean() > 0.95  # or float32 would save no time


def test_rows_are_compared_in_chunks(monkeypatch):
    rows, codewords = torch.randn(50, 3, generator=seeded(0)), torch.randn(7, 3, generator=seeded(1))
    whole = nearest_exactly(rows, codewords)
    for cells in (1, 7, 20, 7 * 49):
        monkeypatch.setattr(module, "CHUNK_CELLS", cells)
        assert torch.equal(whole, nearest_exactly(rows, codewords))


def test_no_rows_have_no_codes():
    assert nearest_exactly(torch.zeros(0, 3), torch.zeros(4, 3)).shape == (0,)


def test_distances_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    rows, codewords = rng.normal(size=(20, 5)), rng.normal(size=(7, 5))
    distances = distances_exactly(torch.from_numpy(rows), torch.from_numpy(codewords))
    assert np.allclose(distances.numpy(), pairwise_distances(rows, codewords) ** 2)
    offsets = torch.arange(7.0)
    assert torch.allclose(distances_exactly(torch.from_numpy(rows), torch.from_numpy(codewords), offsets),
                          distances + offsets)


def test_directions_have_length_1_and_zero_stays_zero():
    assert directions(torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)], [0.0, -1.0], [0.0, 0.0]]


@contextmanager
def cpu_precision(set_precision) -> Iterator[None]:
    """The precision of float32 products on the CPU, changed by `set_precision`."""
    backends = torch.backends
    try:
        set_precision()
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for part in (backends.mkldnn.matmul, backends.cuda.matmul, backends):
            part.fp32_precision = "none"


def set_to(owner: object, precision: str):
    return lambda: setattr(owner, "fp32_precision", precision)


@pytest.mark.parametrize(("set_precision", "is_exact"), [
    (lambda: None, True),
    (set_to(torch.backends.mkldnn.matmul, "ieee"), True),
    (set_to(torch.backends.mkldnn.matmul, "bf16"), False),
    (set_to(torch.backends.mkldnn.matmul, "tf32"), False),
    (set_to(torch.backends.mkldnn, "bf16"), False),
    (set_to(torch.backends, "bf16"), False),
    (set_to(torch.backends, "ieee"), True),
    (set_to(torch.backends.cuda.matmul, "tf32"), True),  # changes only GPUs
    (lambda: torch.set_float32_matmul_precision("high"), False),
    (lambda: torch.set_float32_matmul_precision("medium"), False),
    (lambda: torch.set_float32_matmul_precision("highest"), True),
])
def test_codes_do_not_depend_on_the_precision_of_float32(set_precision, is_exact):
    rows, codewords = torch.randn(300, 64, generator=seeded(0)), torch.randn(50, 64, generator=seeded(1))
    expected = nearest_exactly(rows, codewords)
    with cpu_precision(set_precision):
        assert module._float32_is_exact() == is_exact
        assert torch.equal(nearest_exactly(rows, codewords), expected)
    assert module._float32_is_exact()
