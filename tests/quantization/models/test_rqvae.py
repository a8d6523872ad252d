"""RQ-VAE and VQ-VAE: losses worked out by hand, gradients, initialization, maintenance of codebooks, sizes."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from tests.errors import refused
from tests.quantization.conftest import codebook_options, shown

LATENT = 4


def error_of(model, xs: Tensor) -> float:
    """Mean squared distance between the latents and their quantized values."""
    model.eval()
    with torch.no_grad():
        latent = model.encoder(xs)
        return float((model.quantizer(latent).latent - latent).square().sum(dim=1).mean())


def test_the_codebook_loss_moves_codewords_only(make_rqvae, xs):
    model = make_rqvae()
    model.quantizer(model.encoder(xs)).codebook_loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(codebook.codewords.grad.abs().sum() > 0 for codebook in model.quantizer.codebooks)


def test_the_commitment_loss_moves_the_encoder_only(make_rqvae, xs):
    model = make_rqvae()
    model.quantizer(model.encoder(xs)).commitment_loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert all(codebook.codewords.grad is None for codebook in model.quantizer.codebooks)


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


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "gumbel"])
def test_the_reconstruction_moves_the_encoder_through_the_codes(make_rqvae, xs, generator, gradient):
    model = make_rqvae(gradient=gradient)
    model.initialize(xs, generator)
    reconstruction, _, _ = model(xs)
    (reconstruction - xs).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    reached = [codebook.codewords.grad is not None for codebook in model.quantizer.codebooks]
    assert reached == [gradient == "gumbel"] * 3


def test_every_codebook_moves_in_a_training_step(make_rqvae, xs, generator):
    model = make_rqvae()
    model.initialize(xs, generator)
    before = [codebook.codewords.detach().clone() for codebook in model.quantizer.codebooks]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.compute_loss(model(xs), xs)["loss_total"].backward()
    optimizer.step()
    for old, codebook in zip(before, model.quantizer.codebooks, strict=True):
        assert not torch.equal(old, codebook.codewords)


def test_the_optimizer_leaves_codewords_that_are_averages_alone(make_rqvae, xs, generator):
    model = make_rqvae(update="ema")
    model.initialize(xs, generator)
    assert not any("codewords" in name for name, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.compute_loss(model(xs), xs)["loss_total"].backward()
    averaged = [codebook.codewords.clone() for codebook in model.quantizer.codebooks]
    optimizer.step()
    for before, codebook in zip(averaged, model.quantizer.codebooks, strict=True):
        assert torch.equal(before, codebook.codewords)


def test_the_start_from_kmeans_lowers_the_quantization_error(make_rqvae, xs, generator):
    model = make_rqvae(codebook_size=8)
    before = error_of(model, xs)
    model.initialize(xs, generator)
    assert error_of(model, xs) < 0.2 * before


def test_the_start_uses_every_codeword(make_rqvae, xs, generator):
    model = make_rqvae(codebook_size=8)
    model.initialize(xs, generator)
    codes = model.get_codes(xs)
    assert [len(level.unique()) for level in codes.T] == [8, 8, 8]


def test_a_random_start_takes_codewords_from_the_latents(make_rqvae, xs, generator):
    model = make_rqvae(start="random", codebook_size=8)
    model.initialize(xs, generator)
    with torch.no_grad():
        latent = model.encoder(xs)
        matches = (model.quantizer.codebooks[0].codewords.unsqueeze(1) - latent).abs().amax(dim=2) < 1e-6
    assert matches.any(dim=1).all()
    assert matches.any(dim=0).sum() == 8


def test_unused_codewords_restart_at_residuals(make_rqvae, xs, generator):
    model = make_rqvae(num_levels=2, codebook_size=8).train()
    codebooks = model.quantizer.codebooks
    with torch.no_grad():
        for codebook in codebooks:
            codebook.codewords[3:] = torch.full((LATENT,), 100.0)
    codes = model(xs)[2]
    with torch.no_grad():
        residuals = [model.encoder(xs)]
        residuals.append(residuals[0] - codebooks[0].codewords[codes[:, 0]])
    before = [codebook.codewords.detach().clone() for codebook in codebooks]
    model.maintain(xs, generator)
    for old, codebook, residual, used in zip(before, codebooks, residuals, codes.T, strict=True):
        alive = torch.isin(torch.arange(8), used)
        assert 0 < alive.sum() <= 3
        assert torch.equal(codebook.codewords[alive], old[alive])
        to_residuals = (codebook.codewords[~alive].unsqueeze(1) - residual).abs().amax(dim=2)
        assert to_residuals.amin(dim=1).max() < 1e-6
        assert codebook.usage.sum() == 0


def test_without_restarts_the_end_of_an_epoch_moves_nothing(make_rqvae, xs, generator):
    model = make_rqvae(restart_dead="false", codebook_size=8)
    model(xs)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.maintain(xs, generator)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_usage_of_an_epoch_is_counted_only_in_training(make_rqvae, xs):
    model = make_rqvae().eval()
    model(xs)
    model.get_codes(xs)
    assert all(codebook.usage.sum() == 0 for codebook in model.quantizer.codebooks)
    model.train()
    codes = model(xs)[2]
    for codebook, used in zip(model.quantizer.codebooks, codes.T, strict=True):
        assert torch.equal(codebook.usage.long(), torch.bincount(used, minlength=4))


def test_the_options_of_the_yaml_reach_the_codebooks(make_rqvae):
    model = make_rqvae(update="ema", ema_decay=0.7, sinkhorn_levels="[-1]")
    for codebook in model.quantizer.codebooks:
        assert codebook.options == codebook_options(update="ema", ema_decay=0.7, sinkhorn_levels=[-1],
                                                    kmeans_iterations=5)
    assert [codebook.uniform for codebook in model.quantizer.codebooks] == [False, False, True]


def test_sinkhorn_spreads_the_last_levels_codes_in_training(make_rqvae, xs, generator):
    counts = {}
    for levels in ("[]", "[-1]"):
        model = make_rqvae(num_levels=2, codebook_size=4, sinkhorn_levels=levels, sinkhorn_epsilon=0.02)
        model.initialize(xs + 5 * xs.sign(), generator)
        counts[levels] = torch.bincount(model.train()(xs)[2][:, 1], minlength=4)
    assert counts["[]"].max() > 14
    assert counts["[-1]"].max() <= 12
    assert counts["[-1]"].min() >= 8


def test_standardized_columns_count_equally_in_any_unit(make_rqvae, xs, generator):
    scale, shift = torch.tensor([1.0, 1000.0, 0.01, 1.0, 1.0, 1.0]), torch.tensor([0.0, 500.0, 0.0, -3.0, 0.0, 0.0])
    plain, scaled = (make_rqvae(standardize="true").eval() for _ in range(2))
    plain.initialize(xs, generator)
    scaled.initialize(xs * scale + shift, generator.manual_seed(0))
    outputs = scaled(xs * scale + shift)
    assert torch.equal(plain.get_codes(xs), scaled.get_codes(xs * scale + shift))
    assert torch.allclose(outputs[0], plain(xs)[0] * scale + shift, rtol=1e-3, atol=1e-3)
    assert scaled.compute_loss(outputs, xs * scale + shift)["recon_loss"].item() == pytest.approx(
        plain.compute_loss(plain(xs), xs)["recon_loss"].item(), rel=1e-3)


@pytest.mark.parametrize(("num_items", "size"), [
    (1, 2), (7, 2), (8, 2), (15, 2), (16, 4), (31, 4), (100, 16), (1023, 128), (1024, 256), (1_000_000, 256)])
def test_auto_codebook_size_is_about_a_quarter_of_the_items(make_rqvae, num_items, size):
    assert make_rqvae(num_items, codebook_size="auto").codebook_sizes == [size] * 3


@pytest.mark.parametrize(("num_items", "size"), [
    (7, 2), (16, 4), (1024, 256), (16_383, 2048), (16_384, 4096), (1_000_000, 4096)])
def test_the_one_codebook_of_a_vqvae_may_be_larger(make_config, make_model, num_items, size):
    assert make_model(make_config("vqvae", codebook_size="auto"), num_items).codebook_sizes == [size]


@pytest.mark.parametrize("size", [-4, 2.5, "null", "[4]"])
def test_an_invalid_codebook_size_is_refused(make_rqvae, size):
    with refused(ConfigError, "rqvae.model_params.codebook_size", names=[shown(size), 1], fix=["--codebook_size auto"]):
        make_rqvae(codebook_size=size)


@pytest.mark.parametrize(("key", "value"), [("num_levels", -1), ("num_levels", "auto"), ("num_levels", 1.5),
                                            ("latent_size", -1), ("latent_size", 1.5)])
def test_invalid_levels_and_latent_sizes_are_refused(make_rqvae, key, value):
    with refused(ConfigError, names=[f"rqvae.model_params.{key}", shown(value)]):
        make_rqvae(**{key: value})


def test_a_codebook_may_be_as_large_as_the_catalogue(make_rqvae):
    assert make_rqvae(13, codebook_size=13).codebook_sizes == [13] * 3


def test_the_decoder_mirrors_the_encoder(make_rqvae):
    model = make_rqvae(hidden_sizes="[9, 7]", latent_size=5)
    widths = [[(layer.in_features, layer.out_features) for layer in part if hasattr(layer, "in_features")]
              for part in (model.encoder, model.decoder)]
    assert widths == [[(6, 9), (9, 7), (7, 5)], [(5, 7), (7, 9), (9, 6)]]


def test_without_hidden_layers_the_encoder_is_linear(make_rqvae):
    assert len(make_rqvae(hidden_sizes="[]").encoder) == 1
