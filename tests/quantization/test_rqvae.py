"""RQ-VAE: codes against vector-quantize-pytorch, gradients and losses by hand, its care for the codebooks."""

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from common.errors import ConfigError

LATENT = 4


def random_codebooks(model) -> None:
    """Codewords as large as the residuals that they code, so that every level has several in use."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for level, codebook in enumerate(model.codebooks):
            codebook.codewords.copy_(torch.randn(codebook.codewords.shape, generator=generator) * 0.6**level)


def set_codebooks(model, *codebooks: list[list[float]]) -> None:
    with torch.no_grad():
        for codebook, codewords in zip(model.codebooks, codebooks, strict=True):
            codebook.codewords.copy_(torch.tensor(codewords))


def error_of(model, xs: Tensor) -> float:
    """Mean squared distance between the latents and their quantized values."""
    with torch.no_grad():
        latent = model.encoder(xs)
        return float((model.quantize(latent).latent - latent).square().sum(dim=1).mean())


@pytest.fixture
def latent() -> Tensor:
    return torch.randn(200, LATENT, generator=torch.Generator().manual_seed(2))


def test_residual_quantization_agrees_with_vector_quantize_pytorch(make_rqvae, latent):
    model = make_rqvae(latent_size=LATENT, num_levels=4, codebook_size=16).eval()
    random_codebooks(model)
    oracle = ResidualVQ(dim=LATENT, num_quantizers=4, codebook_size=16).eval()
    for layer, codebook in zip(oracle.layers, model.codebooks, strict=True):
        layer._codebook.embed.copy_(codebook.codewords.detach().unsqueeze(0))
    quantized, codes, _ = oracle(latent)
    ours = model.quantize(latent)
    assert len(torch.unique(codes, dim=0)) > 100
    assert torch.equal(ours.codes, codes)
    assert torch.allclose(ours.latent, quantized, atol=1e-5)


def test_quantization_and_its_losses_by_hand(make_rqvae):
    model = make_rqvae(latent_size=2, num_levels=2, codebook_size=2)
    set_codebooks(model, [[0.0, 0.0], [4.0, 4.0]], [[1.0, 0.0], [0.0, -1.0]])
    quantized = model.quantize(torch.tensor([[5.0, 3.0], [0.0, -2.0]]))
    # Level 1 leaves (1, -1) and (0, -2); level 2 is tied for the first, takes code 0, and leaves (0, -1) twice.
    assert quantized.codes.tolist() == [[1, 0], [0, 1]]
    assert quantized.latent.tolist() == [[5.0, 4.0], [0.0, -1.0]]
    assert quantized.codebook_loss.item() == quantized.commitment_loss.item() == (2 + 4) / 2 + (1 + 1) / 2


def test_the_decoders_input_passes_its_gradient_to_the_latent_unchanged(make_rqvae, latent):
    model = make_rqvae(latent_size=LATENT)
    random_codebooks(model)
    latent.requires_grad_()
    weight = torch.randn_like(latent)
    (model.quantize(latent).latent * weight).sum().backward()
    assert torch.equal(latent.grad, weight)
    assert all(codebook.codewords.grad is None for codebook in model.codebooks)


def test_the_codebook_loss_moves_codewords_only(make_rqvae, xs):
    model = make_rqvae()
    model.quantize(model.encoder(xs)).codebook_loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(codebook.codewords.grad.abs().sum() > 0 for codebook in model.codebooks)


def test_the_commitment_loss_moves_the_encoder_only(make_rqvae, xs):
    model = make_rqvae()
    model.quantize(model.encoder(xs)).commitment_loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert all(codebook.codewords.grad is None for codebook in model.codebooks)


def gradients(model, xs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.compute_loss(model(xs), xs)["loss_total"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_commitment_cost_scales_the_commitment_part_of_the_encoders_gradient(make_rqvae, xs):
    without, small, large = (gradients(make_rqvae(commitment_cost=cost), xs) for cost in (0.0, 0.5, 1.5))
    for name in without:
        part = small[name] - without[name]
        assert torch.allclose(large[name] - without[name], 3 * part, atol=1e-4)
        assert (part.abs().max() > 1e-3) == name.startswith("encoder"), name


def test_the_total_is_the_sum_of_reconstruction_and_quantization(make_rqvae, xs):
    model = make_rqvae()
    reconstruction, quantization_loss, codes = model(xs)
    losses = model.compute_loss((reconstruction, quantization_loss, codes), xs)
    errors = (reconstruction - xs).tolist()
    by_hand = sum(error**2 for row in errors for error in row) / len(xs)
    assert losses["recon_loss"].item() == pytest.approx(by_hand, rel=1e-5)
    assert losses["loss_total"].item() == pytest.approx(by_hand + quantization_loss.item(), rel=1e-5)


def test_every_codebook_moves_in_a_training_step(make_rqvae, xs, generator):
    model = make_rqvae()
    model.initialize(xs, generator)
    before = [codebook.codewords.detach().clone() for codebook in model.codebooks]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.compute_loss(model(xs), xs)["loss_total"].backward()
    optimizer.step()
    for old, codebook in zip(before, model.codebooks, strict=True):
        assert not torch.equal(old, codebook.codewords)


def test_the_start_from_kmeans_lowers_the_quantization_error(make_rqvae, xs, generator):
    model = make_rqvae(codebook_size=8)
    before = error_of(model, xs)
    model.initialize(xs, generator)
    assert error_of(model, xs) < 0.2 * before


def test_the_start_puts_every_codeword_to_use(make_rqvae, xs, generator):
    model = make_rqvae(codebook_size=8)
    model.initialize(xs, generator)
    codes = model.get_codes(xs)
    assert [len(level.unique()) for level in codes.T] == [8, 8, 8]


def test_codewords_that_an_epoch_did_not_use_restart_at_residuals(make_rqvae, xs, generator):
    model = make_rqvae(num_levels=2, codebook_size=8).train()
    far = torch.full((LATENT,), 100.0)
    with torch.no_grad():
        for codebook in model.codebooks:
            codebook.codewords[3:] = far
    codes = model(xs)[2]
    with torch.no_grad():
        residuals = [model.encoder(xs)]
        residuals.append(residuals[0] - model.codebooks[0].codewords[codes[:, 0]])
    before = [codebook.codewords.detach().clone() for codebook in model.codebooks]
    model.end_epoch(xs, generator)
    for old, codebook, residual, used in zip(before, model.codebooks, residuals, codes.T, strict=True):
        alive = torch.isin(torch.arange(8), used)
        assert 0 < alive.sum() <= 3
        assert torch.equal(codebook.codewords[alive], old[alive])
        to_residuals = (codebook.codewords[~alive].unsqueeze(1) - residual).abs().amax(dim=2)
        assert to_residuals.amin(dim=1).max() < 1e-6
        assert codebook.usage.sum() == 0


def test_an_epochs_use_is_counted_in_training_alone(make_rqvae, xs):
    model = make_rqvae().eval()
    model(xs)
    model.get_codes(xs)
    assert all(codebook.usage.sum() == 0 for codebook in model.codebooks)
    model.train()
    codes = model(xs)[2]
    for codebook, used in zip(model.codebooks, codes.T, strict=True):
        assert torch.equal(codebook.usage.long(), torch.bincount(used, minlength=4))


@pytest.mark.parametrize(("num_items", "size"), [
    (1, 2), (7, 2), (8, 2), (15, 2), (16, 4), (31, 4), (100, 16), (1023, 128), (1024, 256), (1_000_000, 256)])
def test_codebook_size_auto_is_the_power_of_two_up_to_a_quarter_of_the_items(make_rqvae, num_items, size):
    assert make_rqvae(num_items, codebook_size="auto").codebook_sizes == [size] * 3


def test_a_codebook_larger_than_the_catalogue_is_an_error_with_both_numbers(make_rqvae):
    with pytest.raises(ConfigError, match="257.* 130 items"):
        make_rqvae(130, codebook_size=257)


def test_a_codebook_as_large_as_the_catalogue_is_none(make_rqvae):
    assert make_rqvae(13, codebook_size=13).codebook_sizes == [13] * 3


@pytest.mark.parametrize("size", [0, -4, "many", "true", 2.5, "null"])
def test_a_codebook_size_that_is_no_count_is_an_error(make_rqvae, size):
    with pytest.raises(ConfigError, match="codebook_size"):
        make_rqvae(codebook_size=size)


@pytest.mark.parametrize(("num_items", "size", "num_levels"), [
    (40, 4, 5),             # 4^5 = 1,024 >= 640 > 4^4
    (64, 32, 2),            # 32^2 = 1,024 = 16 * 64
    (65, 32, 3), (4, 4, 3), (4096, 256, 2), (4097, 256, 3),
    (1_048_576, 256, 3), (1_048_577, 256, 4),
    (40, 40, 2),
])
def test_num_levels_auto_is_the_fewest_that_offer_sixteen_ids_an_item(make_rqvae, num_items, size, num_levels):
    assert make_rqvae(num_items, codebook_size=size, num_levels="auto").codebook_sizes == [size] * num_levels


@pytest.mark.parametrize("key", ["num_levels", "latent_size"])
@pytest.mark.parametrize("value", [0, -1, "many", 1.5])
def test_levels_and_latents_that_are_no_count_are_errors(make_rqvae, key, value):
    with pytest.raises(ConfigError, match=f"{key}: is '?{value}"):
        make_rqvae(**{key: value})


def test_the_decoder_mirrors_the_encoder(make_rqvae):
    model = make_rqvae(hidden_sizes="[9, 7]", latent_size=5)
    widths = [[(layer.in_features, layer.out_features) for layer in part if hasattr(layer, "in_features")]
              for part in (model.encoder, model.decoder)]
    assert widths == [[(6, 9), (9, 7), (7, 5)], [(5, 7), (7, 9), (9, 6)]]
