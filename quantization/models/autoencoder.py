"""Bases of quantizers that code a latent, made by an autoencoder or otherwise."""

from typing import Protocol

import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.codebooks.layers import MLP, RESTART_ROWS, Standardizer, in_float64, sample
from quantization.codebooks.residual import Quantized
from quantization.codebooks.sizes import at_least_one, hidden_sizes

from .abstract_vq import AbstractVQ

# B batch, D input width, H latent size, L levels


class LatentQuantizer(Protocol):
    """A module that turns latents into codes and back; `ResidualQuantizer` is one, `Codebook`s help to build others."""

    @property
    def sizes(self) -> list[int]:
        """The number of codes of each level."""

    def __call__(self, latent: Tensor) -> Quantized:
        """(B, H) -> quantized latents (B, H) that pass a gradient on, codes (B, L), and the two losses."""

    def get_codes(self, latent: Tensor) -> Tensor:
        """(B, H) float64 -> (B, L), whose rows do not depend on each other."""

    def last_distances(self, latent: Tensor) -> Tensor | None:
        """(B, H) float64 -> (B, K) to the codes of the last level, given the codes before; None: not known."""

    def start(self, latent: Tensor, generator: torch.Generator) -> None:
        """Start from the latents (N, H) of the data, before the first step."""

    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """Move codewords that training did not use since the last call to latents of (N, H)."""


class LatentVQ(AbstractVQ):
    """The base of quantizers that code a latent by `self.quantizer`. A derived class overrides `latent`."""

    standardizer: Standardizer
    quantizer: LatentQuantizer

    def measure(self, xs: Tensor) -> None:
        """Measure the data (N, D) before the first latent."""
        self.standardizer.measure(xs)

    def latent(self, xs: Tensor) -> Tensor:
        """(B, D) -> (B, H), in the precision of xs; in float64 no row depends on the others."""
        raise NotImplementedError

    @property
    def codebook_sizes(self) -> list[int]:
        return self.quantizer.sizes

    def get_codes(self, xs: Tensor) -> Tensor:
        return self.quantizer.get_codes(self.latent(xs.double()))

    def last_distances(self, xs: Tensor) -> Tensor | None:
        return self.quantizer.last_distances(self.latent(xs.double()))

    @torch.no_grad()
    def initialize(self, xs: Tensor, generator: torch.Generator) -> None:
        self.measure(xs)
        self.quantizer.start(self.latent(sample(xs, generator)), generator)

    @torch.no_grad()
    def maintain(self, xs: Tensor, generator: torch.Generator) -> None:
        self.quantizer.restart_dead(self.latent(sample(xs, generator, RESTART_ROWS)), generator)


class AutoencoderVQ(LatentVQ):
    """Encoder, quantizer and decoder; the base of quantizers that code a latent.

    A derived class sets `section`, its section of the YAML, and overrides `make_quantizer`. In it `self.params` are the
    section's `model_params`, `self.where` is their place for error messages, `self.latent_size` is H, and
    `self.config["data"]["num_items"]` is the number of items. The YAML has `hidden_sizes`, `latent_size` and
    `standardize`, and the keys that `make_quantizer` reads. It may also override `make_latent_size`, and
    `compute_loss`, whose `forward_outputs` are the reconstruction (B, D), the quantization loss () and codes (B, L).
    """

    section: str

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        self.where = f"{self.section}.model_params"
        self.params = config[self.section]["model_params"]
        self.commitment_cost = config[self.section]["training_params"]["commitment_cost"]
        self.standardizer = Standardizer(input_size, self.params["standardize"])
        self.latent_size = self.make_latent_size()
        widths = [input_size, *hidden_sizes(self.params["hidden_sizes"], self.where), self.latent_size]
        self.encoder, self.decoder = MLP(widths), MLP(widths[::-1])
        self.quantizer = self.make_quantizer()

    def make_latent_size(self) -> int:
        """H, called before the quantizer is made."""
        return at_least_one(self.params["latent_size"], f"{self.where}.latent_size")

    def make_quantizer(self) -> LatentQuantizer:
        """The module that quantizes latents (B, `self.latent_size`)."""
        raise NotImplementedError

    def latent(self, xs: Tensor) -> Tensor:
        seen = self.standardizer(xs)
        return in_float64(self.encoder, seen) if xs.dtype == torch.float64 else self.encoder(seen)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized = self.quantizer(self.encoder(self.standardizer(xs)))
        loss = quantized.codebook_loss + self.commitment_cost * quantized.commitment_loss
        return self.standardizer.undo(self.decoder(quantized.latent)), loss, quantized.codes

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        reconstruction, quantization_loss, _ = forward_outputs
        recon_loss = self.standardizer.scale(reconstruction - original_xs).square().sum(dim=1).mean()
        return {"loss_total": recon_loss + quantization_loss, "recon_loss": recon_loss,
                "quantization_loss": quantization_loss}


def suffixes_with(suffix: str, other: str, quantizer: str) -> list[str]:
    """The embedding suffixes of a quantizer that reads `other` beside the one of the command line."""
    if suffix == other:
        raise ConfigError(f"--embedding_suffix {suffix}", f"is what {quantizer} reads anyway", "it needs an embedding "
                          "of the text beside it", "--embedding_suffix td")
    return [suffix, other]
