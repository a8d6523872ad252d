"""Residual quantization: codes against vector-quantize-pytorch, losses worked out by hand, gradients."""

import pytest
import torch
from torch import Tensor

from quantization.codebooks.residual import ResidualQuantizer, rotate
from tests.quantization.conftest import codebook_options, seeded

WIDTH = 4


def quantizer_of(*codebooks: list[list[float]], **options: object) -> ResidualQuantizer:
    """A quantizer with the given codewords at each level."""
    quantizer = ResidualQuantizer(len(codebooks), len(codebooks[0]), len(codebooks[0][0]),
                                  codebook_options(**options), "here")
    with torch.no_grad():
        for codebook, codewords in zip(quantizer.codebooks, codebooks, strict=True):
            codebook._move(torch.ones(len(codewords), 1, dtype=torch.bool), torch.tensor(codewords))
    return quantizer


def random_quantizer(num_levels: int = 3, size: int = 16, **options: object) -> ResidualQuantizer:
    """Random codewords as long as the residuals, so that every level uses several."""
    return quantizer_of(*((torch.randn(size, WIDTH, generator=seeded(level)) * 0.6**level).tolist()
                          for level in range(num_levels)), **options)


@pytest.fixture
def latent() -> Tensor:
    return torch.randn(200, WIDTH, generator=seeded(20))


def test_residual_quantization_agrees_with_vector_quantize_pytorch(latent):
    from vector_quantize_pytorch import ResidualVQ  # which takes seconds

    ours = random_quantizer(num_levels=4).eval()
    oracle = ResidualVQ(dim=WIDTH, num_quantizers=4, codebook_size=16).eval()
    for layer, codebook in zip(oracle.layers, ours.codebooks, strict=True):
        layer._codebook.embed.copy_(codebook.codewords.detach().unsqueeze(0))
    quantized, codes, _ = oracle(latent)
    assert len(torch.unique(codes, dim=0)) > 100
    assert torch.equal(ours(latent).codes, codes)
    assert torch.equal(ours.get_codes(latent), codes)
    assert torch.allclose(ours(latent).latent, quantized, atol=1e-5)


def test_cosine_residual_quantization_agrees_with_vector_quantize_pytorch(latent):
    from vector_quantize_pytorch import ResidualVQ

    ours = quantizer_of(torch.nn.functional.normalize(torch.randn(16, WIDTH, generator=seeded(5))).tolist(),
                        distance="cosine").eval()
    oracle = ResidualVQ(dim=WIDTH, num_quantizers=1, codebook_size=16, use_cosine_sim=True).eval()
    oracle.layers[0]._codebook.embed.copy_(ours.codebooks[0].codewords.detach().unsqueeze(0))
    assert torch.equal(ours.get_codes(latent), oracle(latent)[1])


def test_quantization_and_its_losses_by_hand():
    quantizer = quantizer_of([[0.0, 0.0], [4.0, 4.0]], [[1.0, 0.0], [0.0, -1.0]])
    quantized = quantizer(torch.tensor([[5.0, 3.0], [0.0, -2.0]]))
    # Level 1 leaves (1, -1) and (0, -2); level 2 is tied for the first, takes code 0, and leaves (0, -1) twice.
    assert quantized.codes.tolist() == [[1, 0], [0, 1]]
    assert quantized.latent.tolist() == [[5.0, 4.0], [0.0, -1.0]]
    assert quantized.codebook_loss.item() == quantized.commitment_loss.item() == (2 + 4) / 2 + (1 + 1) / 2


def test_last_distances_are_those_of_the_last_levels_residual():
    quantizer = quantizer_of([[0.0, 0.0], [4.0, 4.0]], [[1.0, 0.0], [0.0, -1.0]])
    assert quantizer.last_distances(torch.tensor([[5.0, 3.0], [0.0, -2.0]])).tolist() == [[1.0, 1.0], [5.0, 1.0]]


def gradient_of(quantizer: ResidualQuantizer, latent: Tensor, weight: Tensor) -> Tensor:
    latent = latent.clone().requires_grad_()
    (quantizer(latent).latent * weight).sum().backward()
    return latent.grad


def test_straight_through_passes_the_gradient_unchanged(latent):
    quantizer, weight = random_quantizer(), torch.randn_like(latent)
    assert torch.equal(gradient_of(quantizer, latent, weight), weight)
    assert all(codebook.codewords.grad is None for codebook in quantizer.codebooks)


def test_a_rotated_gradient_agrees_with_vector_quantize_pytorch(latent):
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    quantizer, weight = random_quantizer(1, gradient="rotation"), torch.randn_like(latent)
    source = latent.clone().requires_grad_()
    codewords = quantizer.codebooks[0].lookup(quantizer(latent).codes[:, 0]).detach()
    (rotate_to(source, codewords) * weight).sum().backward()
    assert torch.allclose(gradient_of(quantizer, latent, weight), source.grad, atol=1e-5)
    assert all(codebook.codewords.grad is None for codebook in quantizer.codebooks)


def test_a_rotated_gradient_by_hand():
    # (1, 0) becomes (0, 2): a quarter turn to the left and twice the length; so (3, 5) is turned back and doubled.
    latent = torch.tensor([[1.0, 0.0]], requires_grad=True)
    rotated = rotate(latent, torch.tensor([[0.0, 2.0]]))
    (rotated * torch.tensor([[3.0, 5.0]])).sum().backward()
    assert torch.allclose(rotated, torch.tensor([[0.0, 2.0]]), atol=1e-6)
    assert torch.allclose(latent.grad, torch.tensor([[10.0, -6.0]]), atol=1e-6)


@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_every_gradient_option_returns_the_sum_of_the_codewords(latent, gradient, num_levels):
    quantizer = random_quantizer(num_levels, gradient=gradient)
    quantized = quantizer(latent)
    codewords = [codebook.lookup(code) for codebook, code in zip(quantizer.codebooks, quantized.codes.T, strict=True)]
    assert torch.allclose(quantized.latent, sum(codewords), atol=1e-5)


def test_rotation_reaches_the_opposite_direction_and_zero():
    latent = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    wanted = torch.tensor([[-2.0, -4.0], [0.0, 0.0]])
    rotated = rotate(latent, wanted)
    rotated.sum().backward()
    assert torch.allclose(rotated, wanted, atol=1e-6)
    assert latent.grad.isfinite().all()


def test_gumbel_passes_a_gradient_to_the_latent_and_the_codewords(latent):
    quantizer = random_quantizer(gradient="gumbel")
    torch.manual_seed(0)
    gradient = gradient_of(quantizer, latent, torch.randn_like(latent))
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(dim=1) > 0).all()
    assert all(codebook.codewords.grad.abs().sum() > 0 for codebook in quantizer.codebooks)


def test_each_loss_moves_its_own_side(latent):
    for name, moved in (("codebook_loss", "codewords"), ("commitment_loss", "latent")):
        quantizer, source = random_quantizer(), latent.clone().requires_grad_()
        getattr(quantizer(source), name).backward()
        assert (source.grad is not None) == (moved == "latent")
        assert all((codebook.codewords.grad is not None) == (moved == "codewords") for codebook in quantizer.codebooks)


def test_averaged_codewords_move_without_loss_or_gradient(latent):
    quantizer = random_quantizer(update="ema")
    before = [codebook.codewords.clone() for codebook in quantizer.codebooks]
    source = latent.clone().requires_grad_()
    quantized = quantizer(source)
    (quantized.codebook_loss + quantized.commitment_loss).backward()
    assert quantized.codebook_loss.item() == 0.0
    assert source.grad.abs().sum() > 0
    for old, codebook in zip(before, quantizer.codebooks, strict=True):
        assert codebook.codewords.grad is None
        assert not torch.equal(old, codebook.codewords)


def test_averages_lower_the_error_from_step_to_step(latent):
    quantizer = random_quantizer(update="ema", ema_decay=0.5)
    first = quantizer(latent).commitment_loss
    for _ in range(20):
        last = quantizer(latent).commitment_loss
    assert last < 0.7 * first


@pytest.mark.parametrize(("levels", "uniform"), [
    ([], [False] * 3), ([-1], [False, False, True]), ([0, 1], [True, True, False]), ([-3, 2], [True, False, True])])
def test_sinkhorn_levels_count_from_either_end(levels, uniform):
    quantizer = ResidualQuantizer(3, 4, WIDTH, codebook_options(sinkhorn_levels=levels), "here")
    assert [codebook.uniform for codebook in quantizer.codebooks] == uniform


def test_each_level_starts_on_the_residual(latent):
    quantizer = ResidualQuantizer(3, 16, WIDTH, codebook_options(), "here")
    quantizer.start(latent, seeded())
    lengths = []
    residual = latent
    for codebook in quantizer.codebooks:
        residual = residual - codebook.lookup(codebook.nearest(residual))
        lengths.append(float(residual.detach().square().sum(dim=1).mean()))
    assert lengths[0] < 0.4 * float(latent.square().sum(dim=1).mean())
    assert lengths[1] < 0.5 * lengths[0]
    assert lengths[2] < 0.5 * lengths[1]
    assert [len(level.unique()) for level in quantizer.get_codes(latent).T] == [16, 16, 16]
