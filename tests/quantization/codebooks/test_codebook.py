"""The codebook and its options: start, update, distance, gradient, restarts, uniform use."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import ConfigError
from common.precision import matmul_precision
from quantization.codebooks.codebook import Codebook, check_options
from quantization.codebooks.kmeans import kmeans
from quantization.codebooks.residual import ResidualQuantizer
from tests.errors import refused
from tests.quantization.conftest import codebook_options, seeded


def codebook_of(codewords: list[list[float]], uniform: bool = False, **options: object) -> Codebook:
    codebook = Codebook(len(codewords), len(codewords[0]), codebook_options(**options), uniform)
    with torch.no_grad():
        codebook._move(torch.ones(len(codewords), 1, dtype=torch.bool), torch.tensor(codewords))
    return codebook


def test_codebook_looks_up_what_it_finds():
    codewords = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    codebook = codebook_of(codewords.tolist())
    codes = codebook.nearest(torch.tensor([[3.0, 1.0], [0.5, 0.0], [1.0, 9.0]]))
    assert codes.tolist() == [1, 0, 2]
    assert torch.equal(codebook.lookup(codes), codewords[codes])
    assert codebook.distances(torch.tensor([[3.0, 1.0]])).tolist() == [[10.0, 2.0, 18.0]]
    assert len(codebook) == 3


def test_usage_is_counted_only_in_training():
    codebook = codebook_of([[0.0], [1.0], [2.0], [3.0]])
    codebook.eval().choose(torch.tensor([[0.0]]))
    codebook.train()
    codebook.choose(torch.tensor([[2.9], [1.2], [3.4]]))
    codebook.choose(torch.tensor([[9.0]]))
    assert codebook.usage.tolist() == [0, 1, 0, 3]


def test_dead_codewords_move_to_rows_and_the_others_stay():
    codebook = codebook_of([[0.0, 0.0], [50.0, 0.0], [0.0, 9.0], [0.0, 50.0]])
    codebook.choose(torch.tensor([[0.0, 1.0], [1.0, 9.0], [0.0, 8.0]]))
    rows = torch.tensor([[7.0, 7.0], [8.0, 8.0]])
    codebook.restart_dead(rows, seeded())
    assert codebook.codewords[[0, 2]].tolist() == [[0.0, 0.0], [0.0, 9.0]]
    assert all(codeword in rows.tolist() for codeword in codebook.codewords[[1, 3]].tolist())
    assert codebook.usage.tolist() == [0, 0, 0, 0]


def test_a_restarted_averaged_codeword_forgets_its_past():
    codebook = codebook_of([[0.0], [50.0]], update="ema", ema_decay=0.5)
    for _ in range(3):
        codebook.choose(torch.tensor([[0.0]]))
    codebook.restart_dead(torch.tensor([[8.0]]), seeded())
    codebook.choose(torch.tensor([[10.0]]))
    assert codebook.codewords.tolist() == [[0.0], [9.0]]  # (8 + 10) / 2: a restarted codeword counts as one row


def test_without_restarts_dead_codewords_stay():
    codebook = codebook_of([[0.0], [50.0]], restart_dead=False)
    codebook.choose(torch.tensor([[1.0]]))
    codebook.restart_dead(torch.tensor([[7.0]]), seeded())
    assert codebook.codewords.tolist() == [[0.0], [50.0]]
    assert codebook.usage.tolist() == [0, 0]


def test_a_random_start_takes_different_rows_while_there_are_enough():
    rows = torch.arange(20.0).unsqueeze(1)
    codebook = Codebook(20, 1, codebook_options(start="random"))
    codebook.start(rows, seeded())
    assert sorted(codebook.codewords.flatten().tolist()) == list(range(20))
    codebook.start(rows[:3], seeded())
    assert codebook.codewords.unique().tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_start_by_kmeans_takes_its_centroids(distance):
    rows = torch.randn(60, 3, generator=seeded(1))
    codebook = Codebook(5, 3, codebook_options(distance=distance, kmeans_iterations=7))
    codebook.start(rows, seeded())
    assert torch.equal(codebook.codewords, kmeans(rows, 5, 7, seeded(), cosine=distance == "cosine").centroids)


def test_cosine_distance_ignores_the_length_of_a_codeword():
    codewords = [[3.0, 1.0], [0.0, 0.2]]
    row = torch.tensor([[0.3, 0.1]])  # parallel to the first, but close to the second
    for training in (True, False):
        assert codebook_of(codewords).train(training).choose(row)[0].tolist() == [1]
        codes, chosen = codebook_of(codewords, distance="cosine").train(training).choose(row)
        assert codes.tolist() == [0]
        assert chosen.tolist() == [[3.0, 1.0]]
    assert codebook_of(codewords, distance="cosine").nearest(row).tolist() == [0]


def test_moving_averages_by_hand():
    codebook = codebook_of([[0.0], [10.0], [50.0]], update="ema", ema_decay=0.75)
    codebook.choose(torch.tensor([[1.0], [2.0], [3.0], [8.0]]))
    # Counts 1 -> .75 + .25 * (3, 1, 0); sums -> .75 * (0, 10, 50) + .25 * (6, 8, 0).
    assert codebook.counts.tolist() == [1.5, 1.0, 0.75]
    assert codebook.codewords.tolist() == [[1.0], [9.5], [50.0]]
    assert not codebook.codewords.requires_grad


def test_moving_averages_agree_with_vector_quantize_pytorch():
    from vector_quantize_pytorch import VectorQuantize  # which takes seconds

    rows, codewords = torch.randn(500, 4, generator=seeded(0)), torch.randn(16, 4, generator=seeded(1))
    ours = codebook_of(codewords.tolist(), update="ema", ema_decay=0.9)
    oracle = VectorQuantize(4, 16, decay=0.9, eps=1e-9, rotation_trick=False)
    oracle._codebook.embed.copy_(codewords.unsqueeze(0))
    oracle._codebook.embed_avg.copy_(codewords.unsqueeze(0))
    for batch in rows.split(100):
        _, codes, _ = oracle(batch)
        assert torch.equal(ours.choose(batch)[0], codes)
    assert torch.allclose(ours.codewords, oracle.codebook, atol=1e-5)
    assert not torch.allclose(ours.codewords, codewords, atol=0.1)


def test_averages_do_not_move_outside_training():
    codebook = codebook_of([[0.0], [10.0]], update="ema", ema_decay=0.5).eval()
    codebook.choose(torch.tensor([[1.0]]))
    assert codebook.codewords.tolist() == [[0.0], [10.0]]


def test_an_averaged_codeword_without_rows_stays():
    codebook = codebook_of([[0.0], [10.0]], update="ema", ema_decay=0.5)
    for _ in range(200):  # 0.5^200 is far below the smallest float32
        codebook.choose(torch.tensor([[1.0]]))
    assert codebook.codewords[1].item() == 10.0


def test_gumbel_draws_codes_in_proportion_to_their_softmax():
    codebook = codebook_of([[0.0], [1.0], [2.0]], gradient="gumbel", gumbel_temperature=2.0)
    torch.manual_seed(0)
    codes, codewords = codebook.choose(torch.full((20_000, 1), 0.5))
    # Draws follow the softmax of -(1/4, 1/4, 9/4) at every temperature, which affects only the gradient.
    expected = torch.softmax(torch.tensor([-0.25, -0.25, -2.25]), dim=0)
    assert torch.allclose(torch.bincount(codes) / 20_000, expected, atol=0.015)
    assert torch.allclose(codewords, codes.unsqueeze(1).float())


def test_gumbel_passes_a_gradient_to_rows_and_codewords():
    codebook = codebook_of([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], gradient="gumbel")
    rows = torch.randn(30, 2, generator=seeded()).requires_grad_()
    (codebook.choose(rows)[1] * torch.tensor([1.0, 3.0])).sum().backward()
    assert (rows.grad.abs().sum(dim=1) > 0).all()
    assert (codebook.codewords.grad.abs().sum(dim=1) > 0).all()


def test_gumbel_draws_only_in_training():
    codebook = codebook_of([[0.0], [1.0]], gradient="gumbel", gumbel_temperature=100.0).eval()
    assert codebook.choose(torch.full((100, 1), 0.4))[0].unique().tolist() == [0]


def test_sinkhorn_moves_the_rows_that_lose_least():
    codebook = codebook_of([[0.0], [10.0]], uniform=True, sinkhorn_iterations=100)
    rows = torch.tensor([[3.0], [0.0], [2.0], [1.0]])  # all nearest to the first
    assert codebook.nearest(rows).tolist() == [0, 0, 0, 0]
    assert codebook.choose(rows)[0].tolist() == [1, 0, 1, 0]
    assert codebook.usage.tolist() == [2, 2]


@pytest.mark.parametrize("seed", range(4))
def test_sinkhorns_shares_are_about_equal(seed):
    codebook = codebook_of(torch.randn(8, 4, generator=seeded(seed)).tolist(), uniform=True, sinkhorn_epsilon=0.02)
    rows = torch.randn(400, 4, generator=seeded(100 + seed))
    assert torch.bincount(codebook.nearest(rows), minlength=8).max() > 70
    counts = torch.bincount(codebook.choose(rows)[0], minlength=8)
    assert counts.max() <= 60
    assert counts.min() >= 40


def test_sinkhorn_keeps_equally_used_codes():
    codewords = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]
    rows = torch.tensor(codewords).repeat(5, 1) + torch.rand(15, 2, generator=seeded())
    codebook = codebook_of(codewords, uniform=True)
    assert torch.equal(codebook.choose(rows)[0], codebook.nearest(rows))


def test_sinkhorn_works_only_in_training():
    codebook = codebook_of([[0.0], [10.0]], uniform=True).eval()
    assert codebook.choose(torch.tensor([[3.0], [0.0], [2.0], [1.0]]))[0].tolist() == [0, 0, 0, 0]


def test_codebook_options_reach_every_level():
    options = codebook_options(sinkhorn_levels=[0, -1, -3], gradient="rotation", update="ema", distance="cosine")
    codebooks = ResidualQuantizer(3, 4, 2, options, "here").codebooks
    assert [(c.uniform, c.averaged, c.cosine) for c in codebooks] == [(True, True, True), (False, True, True),
                                                                     (True, True, True)]


@pytest.mark.parametrize(("options", "key", "names"), [
    ({"gradient": "gumbel", "update": "ema"}, "update", ["gumbel", "ema"]),
    ({"sinkhorn_levels": [5]}, "sinkhorn_levels", [5, 3]),
    ({"sinkhorn_levels": [3]}, "sinkhorn_levels", [3]),
    ({"sinkhorn_levels": [-4]}, "sinkhorn_levels", [-4, 3]),
    ({"sinkhorn_levels": [0, "last"]}, "sinkhorn_levels", ["'last'", 3]),
    ({"sinkhorn_levels": [True]}, "sinkhorn_levels", [True, 3]),
    ({"sinkhorn_epsilon": 0.0}, "sinkhorn_epsilon", [0.0]),
    ({"gumbel_temperature": -1.0}, "gumbel_temperature", [-1.0])])
def test_incompatible_codebook_options_are_refused(options, key, names):
    with refused(ConfigError, f"here.{key}", names=names):
        check_options(codebook_options(**options), "here", num_levels=3)


class Products(TorchDispatchMode):
    """Records the precision on a GPU of each float32 matrix product inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.precisions: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ in ("addmm", "mm", "mv", "bmm") and result.dtype == torch.float32:
            self.precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return result


@pytest.mark.parametrize(("options", "act"), [
    ({}, Codebook.choose), ({"distance": "cosine"}, Codebook.choose), ({"update": "ema"}, Codebook.choose),
    ({"gradient": "gumbel"}, Codebook.choose), ({}, Codebook.nearest_in_float32),
    ({}, lambda codebook, rows: codebook.start(rows, seeded()))])
def test_training_in_tf32_searches_codewords_in_float32(options, act):
    codebook, rows = codebook_of(torch.randn(8, 4, generator=seeded()).tolist(), **options), torch.randn(64, 4)
    with Products() as products, matmul_precision("tf32"):
        act(codebook, rows)
        rows @ rows.T
    assert len(products.precisions) > 1
    assert set(products.precisions[:-1]) == {"ieee"}
    assert products.precisions[-1] == "tf32"
