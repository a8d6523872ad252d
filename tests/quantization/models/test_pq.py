"""Product quantization, plain and after a rotation, against faiss."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.models.opq import OPQ, balanced_components
from quantization.models.pq import PQ
from tests.errors import refused
from tests.quantization.conftest import numbers, seeded

WIDTH, NUM_PARTS, SIZE = 32, 4, 32
NO_FAISS = "faiss is not installed (requirements-dev.txt)"


@pytest.fixture(scope="module")
def correlated() -> Tensor:
    """(3000, 32) with correlated columns of different variance, so that a rotation helps."""
    mix = torch.randn(WIDTH, WIDTH, generator=seeded(1)) * torch.logspace(0, -1, WIDTH).unsqueeze(1)
    return torch.randn(3000, WIDTH, generator=seeded(2)) @ mix


@pytest.fixture(scope="module")
def fitted(make_config):
    """class, xs, key=value, ... -> the model fitted to them."""
    def fit(model_class: type, xs: Tensor, **own):
        sizes = {"num_levels": NUM_PARTS, "codebook_size": SIZE, "iterations": 25, "rotation_iterations": 20}
        config = make_config(model_class.section, **sizes | own)
        model = model_class(config.for_model(num_items=len(xs), inputs={"td": xs.shape[1]}), xs.shape[1])
        assert model.fit(xs, seeded())
        return model.eval()

    return fit


@pytest.fixture(scope="module")
def pq(fitted, correlated) -> PQ:
    return fitted(PQ, correlated)


@pytest.fixture(scope="module")
def opq(fitted, correlated) -> OPQ:
    return fitted(OPQ, correlated)


def distortion(model, xs: Tensor) -> float:
    return float(model.compute_loss(model(xs), xs)["loss_total"])


def test_each_part_is_coded_by_a_codebook_of_its_own(fitted):
    # Two values in each half, in all four combinations.
    xs = torch.tensor([[0.0, 0.0, 5.0, 5.0], [9.0, 9.0, 5.0, 5.0], [0.0, 0.0, 7.0, 7.0], [9.0, 9.0, 7.0, 7.0]])
    model = fitted(PQ, xs, num_levels=2, codebook_size=2)
    assert [sorted(codewords.tolist()) for codewords in model.codewords] == [[[0.0, 0.0], [9.0, 9.0]],
                                                                              [[5.0, 5.0], [7.0, 7.0]]]
    codes = model.get_codes(xs)
    assert (codes[0, 0] == codes[2, 0], codes[0, 1] == codes[1, 1]) == (True, True)
    assert len(codes.unique(dim=0)) == 4
    assert torch.equal(model(xs)[0], xs)
    assert torch.equal(model.join(codes), xs)


def test_the_distortion_of_pq_equals_that_of_faiss(pq, correlated):
    faiss = pytest.importorskip("faiss", reason=NO_FAISS)
    oracle = faiss.ProductQuantizer(WIDTH, NUM_PARTS, 5)
    oracle.train(correlated.numpy())
    errors = oracle.decode(oracle.compute_codes(correlated.numpy())) - correlated.numpy()
    assert distortion(pq, correlated) == pytest.approx(float((errors**2).sum(axis=1).mean()), rel=0.02)


def test_pq_and_faiss_give_equal_codes_for_equal_codewords(pq, correlated):
    faiss = pytest.importorskip("faiss", reason=NO_FAISS)
    oracle = faiss.ProductQuantizer(WIDTH, NUM_PARTS, 8)  # one byte per code, which needs no unpacking
    padded = torch.full((NUM_PARTS, 256, WIDTH // NUM_PARTS), 1e6)
    padded[:, :SIZE] = pq.codewords
    faiss.copy_array_to_vector(padded.numpy().ravel(), oracle.centroids)
    assert torch.equal(pq.get_codes(correlated).byte(), torch.from_numpy(oracle.compute_codes(correlated.numpy())))


@pytest.mark.slow
def test_the_distortion_of_opq_equals_that_of_faiss(fitted, opq, correlated):
    faiss = pytest.importorskip("faiss", reason=NO_FAISS)
    rotation = faiss.OPQMatrix(WIDTH, NUM_PARTS)
    rotation.niter = 20
    rotation.pq = faiss.ProductQuantizer(WIDTH, NUM_PARTS, 5)
    rotation.train(correlated.numpy())
    rotated = rotation.apply(correlated.numpy())
    oracle = faiss.ProductQuantizer(WIDTH, NUM_PARTS, 5)
    oracle.train(rotated)
    theirs = oracle.decode(oracle.compute_codes(rotated))
    expected = float(((theirs - rotated) ** 2).sum(axis=1).mean())
    assert distortion(opq, correlated) == pytest.approx(expected, rel=0.02)
    assert distortion(fitted(OPQ, correlated, first_rotation="components"), correlated) < 0.97 * expected


def test_balanced_components_by_hand():
    """The variances are 16, 4, 2 and 1: 16 belongs to the first part, 4 and 2 to the second, 1 to the first."""
    rows = torch.cat([sign * torch.diag(torch.tensor([2.0, 1.0, 16.0, 4.0]).sqrt()) for sign in (-1, 1)])
    assert torch.allclose(balanced_components(rows, 2).abs(), torch.eye(4)[[2, 1, 3, 0]], atol=1e-6)


@pytest.mark.parametrize("start", ["random", "components"])
def test_equal_items_have_a_rotation(fitted, start):
    model = fitted(OPQ, torch.ones(8, WIDTH), codebook_size=2, rotation_iterations=2, first_rotation=start)
    assert torch.allclose(model.rotation @ model.rotation.T, torch.eye(WIDTH), atol=1e-5)


def test_the_rotation_lowers_the_distortion(pq, opq, correlated):
    assert distortion(opq, correlated) < 0.95 * distortion(pq, correlated)


def test_the_rotation_is_orthogonal_and_is_undone(opq, correlated):
    assert torch.allclose(opq.rotation @ opq.rotation.T, torch.eye(WIDTH), atol=1e-4)
    rotated = opq.parts(correlated).transpose(0, 1).reshape(len(correlated), WIDTH)
    assert torch.allclose(rotated.float() @ opq.rotation, correlated, atol=1e-3)


@pytest.mark.parametrize("size", [1, 3, 40])
def test_opq_takes_codebooks_of_any_size(fitted, correlated, size):
    model = fitted(OPQ, correlated[:40].contiguous(), codebook_size=size, rotation_iterations=2)
    assert model.codebook_sizes == [size] * NUM_PARTS
    assert int(model.get_codes(correlated[:40]).max()) < size


def test_opq_takes_fewer_items_than_columns(fitted, correlated):
    few = correlated[:WIDTH // 2].contiguous()
    model = fitted(OPQ, few, codebook_size=4, rotation_iterations=2)
    assert model.get_codes(few).shape == (WIDTH // 2, NUM_PARTS)
    assert torch.allclose(model.rotation @ model.rotation.T, torch.eye(WIDTH), atol=1e-4)


def test_all_items_are_coded_if_kmeans_samples_rows(fitted, correlated):
    model = fitted(PQ, correlated, max_rows=100, iterations=2)
    assert model.get_codes(correlated).shape == (3000, NUM_PARTS)
    assert distortion(model, correlated) > 1.1 * distortion(fitted(PQ, correlated, iterations=2), correlated)


def test_noncontiguous_embeddings_have_the_same_codes(pq, correlated):
    assert torch.equal(pq.get_codes(correlated), pq.get_codes(correlated.T.contiguous().T))


@pytest.mark.parametrize("model_class", [PQ, OPQ])
def test_a_width_that_levels_do_not_divide_is_refused(fitted, model_class):
    with refused(ConfigError, f"{model_class.section}.model_params.num_levels") as raised:
        fitted(model_class, torch.zeros(70, WIDTH), num_levels=5)
    assert {"5", "32"} <= set(numbers(f"{raised.value.what} {raised.value.why}"))
    assert numbers(raised.value.fix) == ["1", "2", "4", "8", "16", "32"]
