"""The precision of matrix products on a GPU. Its setting exists without a GPU, too."""

import pytest
import torch

from common.precision import matmul_precision


def current() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_precision_holds_inside_the_block_only(precision):
    before = current()
    with matmul_precision(precision):
        assert current() == precision
    assert current() == before


def test_an_inner_block_restores_the_precision_of_the_outer_one():
    with matmul_precision("tf32"):
        with matmul_precision("ieee"):
            assert current() == "ieee"
        assert current() == "tf32"


def test_an_exception_restores_the_precision():
    before = current()
    with pytest.raises(KeyError), matmul_precision("tf32"):
        raise KeyError
    assert current() == before


def test_a_decorated_function_can_be_called_repeatedly():
    decorated = matmul_precision("ieee")(current)
    with matmul_precision("tf32"):
        assert [decorated(), decorated(), current()] == ["ieee", "ieee", "tf32"]


def test_an_unknown_precision_is_refused():
    before = current()
    with pytest.raises(RuntimeError, match="fast"), matmul_precision("fast"):
        pass
    assert current() == before


def test_products_on_the_cpu_do_not_change():
    rows = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    with matmul_precision("tf32"):
        lowered = rows @ rows
    assert torch.equal(lowered, rows @ rows)
