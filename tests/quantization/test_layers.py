"""MLP, codebook and k-means."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin

from quantization.models.layers import MLP, Codebook, kmeans, nearest


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inertia(rows: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((rows.unsqueeze(1) - centroids).square().sum(dim=2).min(dim=1).values.sum())


def test_mlp_has_relu_between_its_layers_and_none_behind_the_last():
    mlp = MLP([1, 2, 1])
    with torch.no_grad():
        mlp[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        mlp[2].weight.copy_(torch.tensor([[-2.0, -5.0]]))
        mlp[0].bias.zero_()
        mlp[2].bias.zero_()
    assert mlp(torch.tensor([[3.0], [-1.0]])).tolist() == [[-6.0], [-5.0]]  # -2 * relu(3), -5 * relu(1)


def test_mlp_of_one_layer_is_linear():
    assert len(MLP([3, 2])) == 1


def test_nearest_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    rows, centroids = rng.normal(size=(200, 5)).astype(np.float32), rng.normal(size=(17, 5)).astype(np.float32)
    assert np.array_equal(nearest(torch.from_numpy(rows), torch.from_numpy(centroids)).numpy(),
                          pairwise_distances_argmin(rows, centroids))


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_agrees_with_scikit_learn_from_the_same_start(seed):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(300, 4)).astype(np.float32))
    start = kmeans(rows, 8, 0, seeded(seed))
    oracle = KMeans(8, init=start.numpy(), n_init=1, max_iter=200, tol=0.0, algorithm="lloyd").fit(rows.numpy())
    centroids = kmeans(rows, 8, 200, seeded(seed))
    assert inertia(rows, centroids) == pytest.approx(oracle.inertia_, rel=1e-4)
    assert np.allclose(centroids.numpy(), oracle.cluster_centers_, atol=1e-4)


def test_kmeans_starts_from_distinct_rows():
    rows = torch.arange(10.0).unsqueeze(1)
    start = kmeans(rows, 10, 0, seeded())
    assert sorted(start.flatten().tolist()) == list(range(10))


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_refills_empty_clusters(seed):
    # Nearly every start has its three centroids on the one spot where 97 rows lie.
    rows = torch.cat([torch.zeros(97, 2), torch.tensor([[10.0, 0.0], [0.0, 10.0]])])
    centroids = kmeans(rows, 3, 5, seeded(seed))
    assert sorted(centroids.tolist()) == [[0.0, 0.0], [0.0, 10.0], [10.0, 0.0]]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_kmeans_works_with_fewer_rows_than_clusters(num_rows):
    rows = torch.randn(num_rows, 3, generator=seeded())
    centroids = kmeans(rows, 8, 10, seeded())
    assert centroids.shape == (8, 3)
    assert centroids.isfinite().all()
    assert inertia(rows, centroids) == pytest.approx(0.0, abs=1e-10)


def test_kmeans_is_a_function_of_its_generator():
    rows = torch.randn(50, 3, generator=seeded())
    assert torch.equal(kmeans(rows, 5, 3, seeded(1)), kmeans(rows, 5, 3, seeded(1)))
    assert not torch.equal(kmeans(rows, 5, 3, seeded(1)), kmeans(rows, 5, 3, seeded(2)))


def test_codebook_looks_up_what_it_finds():
    codebook = Codebook(3, 2)
    codewords = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    codebook.codewords.data.copy_(codewords)
    codes = codebook.nearest(torch.tensor([[3.0, 1.0], [0.5, 0.0], [1.0, 9.0]]))
    assert codes.tolist() == [1, 0, 2]
    assert torch.equal(codebook.lookup(codes), codewords[codes])


def test_codebook_counts_repeated_codes():
    codebook = Codebook(4, 2)
    codebook.count(torch.tensor([3, 1, 3]))
    codebook.count(torch.tensor([3]))
    assert codebook.usage.tolist() == [0, 1, 0, 3]


def test_dead_codewords_move_to_rows_and_the_others_stay():
    codebook = Codebook(4, 2)
    before = codebook.codewords.detach().clone()
    codebook.count(torch.tensor([0, 2, 2]))
    rows = torch.tensor([[7.0, 7.0], [8.0, 8.0]])
    codebook.restart_dead(rows, seeded())
    assert torch.equal(codebook.codewords[[0, 2]], before[[0, 2]])
    assert all(codeword in rows.tolist() for codeword in codebook.codewords[[1, 3]].tolist())
    assert codebook.usage.tolist() == [0, 0, 0, 0]
