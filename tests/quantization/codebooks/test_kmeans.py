"""k-means against scikit-learn, by cosine distance, and with a limit to the size of clusters."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from torch import Tensor

from quantization.codebooks.kmeans import kmeans
from quantization.codebooks.nearest import nearest_exactly
from tests.quantization.conftest import seeded


def inertia(rows: Tensor, centroids: Tensor) -> float:
    return float((rows.unsqueeze(1) - centroids).square().sum(dim=2).min(dim=1).values.sum())


def centroids_of(*args, **kwargs) -> Tensor:
    return kmeans(*args, **kwargs).centroids


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_agrees_with_scikit_learn_from_the_same_start(seed):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(300, 4)).astype(np.float32))
    start = centroids_of(rows, 8, 0, seeded(seed))
    oracle = KMeans(8, init=start.numpy(), n_init=1, max_iter=200, tol=0.0, algorithm="lloyd").fit(rows.numpy())
    centroids = centroids_of(rows, 8, 200, seeded(seed))
    assert inertia(rows, centroids) == pytest.approx(oracle.inertia_, rel=1e-4)
    assert np.allclose(centroids.numpy(), oracle.cluster_centers_, atol=1e-4)


DATA = {
    "apart": (make_blobs(2000, 16, centers=20, random_state=0)[0], 20),
    "overlapping": (make_blobs(2000, 16, centers=20, cluster_std=5.0, random_state=0)[0], 32),
    "no blobs": (np.random.default_rng(0).normal(size=(2000, 16)), 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_mean_inertia_is_within_one_percent_of_scikit_learn(name):
    rows, num_clusters = DATA[name][0].astype(np.float32), DATA[name][1]
    oracle = [KMeans(num_clusters, n_init=1, max_iter=100, random_state=seed).fit(rows).inertia_ for seed in range(8)]
    rows = torch.from_numpy(rows)
    ours = [inertia(rows, centroids_of(rows, num_clusters, 100, seeded(seed))) for seed in range(8)]
    assert np.mean(ours) < 1.01 * np.mean(oracle)


def test_kmeans_starts_from_distinct_rows():
    rows = torch.arange(10.0).unsqueeze(1)
    start = centroids_of(rows, 10, 0, seeded())
    assert sorted(start.flatten().tolist()) == list(range(10))


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_the_few_rows_that_differ(seed):
    rows = torch.cat([torch.zeros(97, 2), torch.tensor([[10.0, 0.0], [0.0, 10.0]])])
    centroids = centroids_of(rows, 3, 5, seeded(seed))
    assert sorted(centroids.tolist()) == [[0.0, 0.0], [0.0, 10.0], [10.0, 0.0]]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("max_size", [None, 1])
def test_kmeans_works_with_fewer_rows_than_clusters(num_rows, max_size):
    rows = torch.randn(num_rows, 3, generator=seeded())
    centroids = centroids_of(rows, 8, 10, seeded(), max_size=max_size)
    assert centroids.shape == (8, 3)
    assert centroids.isfinite().all()
    assert inertia(rows, centroids) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_kmeans_works_if_all_rows_are_equal(value, cosine):
    rows = torch.full((50, 3), value)
    centroids = centroids_of(rows, 8, 10, seeded(), cosine=cosine)
    assert centroids.isfinite().all()
    assert inertia(rows, centroids) == pytest.approx(0.0, abs=1e-6 * (1 + value**2))


def test_kmeans_is_a_function_of_its_generator():
    rows = torch.randn(50, 3, generator=seeded())
    assert torch.equal(centroids_of(rows, 5, 3, seeded(1)), centroids_of(rows, 5, 3, seeded(1)))
    assert not torch.equal(centroids_of(rows, 5, 3, seeded(1)), centroids_of(rows, 5, 3, seeded(2)))


def test_without_a_limit_there_are_no_offsets():
    rows = torch.randn(50, 3, generator=seeded())
    clusters = kmeans(rows, 5, 3, seeded())
    assert clusters.offsets is None
    assert torch.equal(clusters.assign(rows), nearest_exactly(rows, clusters.centroids))


def test_cosine_kmeans_groups_directions_regardless_of_length():
    rows = torch.tensor([[1.0, 0.1], [50.0, 4.0], [9.0, 1.0], [0.1, 1.0], [4.0, 50.0], [1.0, 9.0]])
    centroids = centroids_of(rows, 2, 10, seeded(), cosine=True)
    assert sorted(centroids.tolist()) == [pytest.approx([5.1 / 3, 20.0]), pytest.approx([20.0, 5.1 / 3])]


def test_the_row_with_the_least_loss_leaves_a_full_cluster():
    rows = torch.tensor([[0.0], [0.1], [0.2], [10.0]])
    alone = kmeans(rows, 2, 10, seeded()).assign(rows)
    assert (alone == alone[3]).tolist() == [False, False, False, True]
    limited = kmeans(rows, 2, 10, seeded(), max_size=2).assign(rows)
    assert (limited == limited[3]).tolist() == [False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_rows", "num_clusters", "max_size", "shift"), [
    (400, 8, 75, 0.0), (400, 8, 75, 100.0), (320, 16, 30, 0.0), (1000, 32, 47, 1.0),  # 1.5 times the equal share
    (320, 16, 20, 0.0), (50, 50, 1, 0.0), (40, 1, 40, 0.0)])
def test_no_cluster_is_above_the_limit(seed, num_rows, num_clusters, max_size, shift):
    rows = torch.randn(num_rows, 5, generator=seeded(100 + seed)) + shift
    clusters = kmeans(rows, num_clusters, 5, seeded(seed), max_size=max_size)
    for codes in (clusters.assign(rows), nearest_exactly(rows, clusters.centroids, clusters.offsets)):
        assert torch.bincount(codes).max() <= max_size


@pytest.mark.slow
def test_the_limit_holds_if_most_rows_are_crowded():
    lengths = torch.exp(2 * torch.randn(3000, 1, generator=seeded()))
    rows = torch.randn(3000, 8, generator=seeded(1)) * lengths
    assert torch.bincount(kmeans(rows, 64, 5, seeded(), max_size=71).assign(rows)).max() <= 71


@pytest.mark.parametrize("seed", range(3))
def test_equal_rows_stay_together_even_above_the_limit(seed):
    rows = torch.randn(60, 3, generator=seeded(seed))
    rows[:40] = rows[0]
    clusters = kmeans(rows, 6, 5, seeded(seed), max_size=10)
    codes = nearest_exactly(rows, clusters.centroids, clusters.offsets)
    assert len(codes[:40].unique()) == 1
    assert clusters.centroids.isfinite().all()
    assert clusters.offsets.isfinite().all()
