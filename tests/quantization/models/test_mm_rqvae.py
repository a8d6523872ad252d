"""RQ-VAE over text and image: items that lack one of them, and a loss for each."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.models.mm_rqvae import MMRQVAE
from tests.errors import refused
from tests.quantization.conftest import WIDTH, seeded


@pytest.fixture
def make(make_config, make_model):
    def make(**own):
        return make_model(make_config("mm_rqvae", **own))

    return make


@pytest.fixture
def both() -> Tensor:
    """Text and image of 40 items; the second and fourth have no image, the third no text."""
    xs = torch.randn(40, 2 * WIDTH, generator=seeded(4))
    xs[[1, 3], WIDTH:] = 0.0
    xs[2, :WIDTH] = 0.0
    return xs


def test_the_latent_is_the_mean_of_available_modalities(make, both):
    model = make()
    text, image = model.encoders[0](both[:, :WIDTH]), model.encoders[1](both[:, WIDTH:])
    latent = model.latent(both)
    assert torch.allclose(latent[0], (text[0] + image[0]) / 2)
    assert torch.allclose(latent[1], text[1])
    assert torch.allclose(latent[2], image[2])
    assert torch.allclose(model.latent(both.double()).float(), latent, atol=1e-6)


def test_missing_modalities_add_nothing_to_the_loss(make, both):
    model = make()
    made = torch.zeros_like(both)
    made[[1, 3], WIDTH:] = 100.0
    losses = model.compute_loss((made, torch.tensor(0.5), None), both)
    text, image = (sum(value**2 for row in part.tolist() for value in row)
                   for part in (both[:, :WIDTH], both[:, WIDTH:]))
    assert losses["recon_loss_td"].item() == pytest.approx(text / 39, rel=1e-5)
    assert losses["recon_loss_image"].item() == pytest.approx(image / 38, rel=1e-5)
    assert losses["loss_total"].item() == pytest.approx(text / 39 + image / 38 + 0.5, rel=1e-5)


def test_missing_modalities_have_no_gradient(make, both):
    model = make()
    lacking = both[[1, 3]]
    model.compute_loss(model(lacking), lacking)["loss_total"].backward()
    for part, moved in zip((model.encoders, model.decoders), ("encoder", "decoder"), strict=True):
        assert any(p.grad.abs().sum() > 0 for p in part[0].parameters()), moved
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in part[1].parameters()), moved


@pytest.mark.parametrize("standardize", ["true", "false"])
def test_a_catalogue_without_images_has_finite_losses_and_gradients(make, both, generator, standardize):
    model = make(standardize=standardize)
    both[:, WIDTH:] = 0.0
    model.initialize(both, generator)
    losses = model.compute_loss(model(both), both)
    losses["loss_total"].backward()
    assert losses["recon_loss_image"].item() == 0.0
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_columns_are_standardized_by_the_items_that_have_them(make, both, generator):
    model = make(standardize="true")
    model.initialize(both, generator)
    present = both[both[:, WIDTH:].abs().sum(dim=1) > 0, WIDTH:]
    assert torch.allclose(model.standardizers[1].mean, present.mean(dim=0), atol=1e-6)
    assert torch.allclose(model.standardizers[1].deviation, present.std(dim=0, correction=0), atol=1e-6)


def test_the_reconstruction_has_the_columns_of_both(make, both):
    model = make().eval()
    latent = model.quantizer(model.latent(both)).latent
    reconstruction, _, codes = model(both)
    assert torch.allclose(reconstruction, torch.cat([model.decoders[0](latent), model.decoders[1](latent)], dim=1))
    assert codes.shape == (40, 3)


def test_the_image_embedding_is_read_too():
    assert MMRQVAE.embedding_suffixes({}, "td") == ["td", "image"]
    with refused(ConfigError, "--embedding_suffix image", names=["mm_rqvae"], fix=["--embedding_suffix td"]):
        MMRQVAE.embedding_suffixes({}, "image")
