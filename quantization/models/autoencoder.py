"""Base classes of quantizers that quantize a latent, with or without an autoencoder."""

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
    """A module that quantizes latents, such as `ResidualQuantizer`. Others can be built from `Codebook`s."""

    @property
    def sizes(self) -> list[int]:
        """The number of codes of each level."""

    def __call__(self, latent: Tensor) -> Quantized:
        """Return the quantized latents (B, H), which pass gradients on, the codes (B, L), and two losses."""

    def get_codes(self, latent: Tensor) -> Tensor:
        """Return the codes: float64 (B, H) -> (B, L). The codes of a row must not depend on other rows."""

    def last_distances(self, latent: Tensor) -> Tensor | None:
        """Return the distances to all codes of the last level: float64 (B, H) -> (B, K), or None if unknown.

        Each row keeps its codes in the other levels.
        """

    def start(self, latent: Tensor, generator: torch.Generator) -> None:
        """Initialize the quantizer from the latents (N, H) of the data, before the first step."""

    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """Move codewords that training has not used since the last call to some of the latents (N, H)."""


class LatentVQ(AbstractVQ):
    """Base class of quantizers that quantize a latent with `self.quantizer`. A derived class overrides `latent`."""

    standardizer: Standardizer
    quantizer: LatentQuantizer

    def measure(self, xs: Tensor) -> None:
        """Measure the mean and deviation of the data (N, D), before any latent is computed."""
        self.standardizer.measure(xs)

    def latent(self, xs: Tensor) -> Tensor:
        """Return the latents, in the precision of xs: (B, D) -> (B, H). In float64, rows must be independent."""
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
    """Base class of autoencoders whose latent is quantized.

    A derived class sets `section`, the name of its section in the configuration, and overrides `make_quantizer`. That
    method can use `self.params` (the `model_params` of the section), `self.where` (their path, for error messages),
    `self.latent_size` (H) and `self.config["data"]["num_items"]`. The `model_params` must have the keys `hidden_sizes`,
    `latent_size`, `standardize`, and those that `make_quantizer` reads.

    A derived class may also override `make_latent_size` and `compute_loss`. The `forward_outputs` of `compute_loss` are
    the reconstruction (B, D), the quantization loss () and the codes (B, L).
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
        """Return the latent size H. Called before `make_quantizer`."""
        return at_least_one(self.params["latent_size"], f"{self.where}.latent_size")

    def make_quantizer(self) -> LatentQuantizer:
        """Return the module that quantizes latents (B, `self.latent_size`)."""
        raise NotImplementedError

    def latent(self, xs: Tensor) -> Tensor:
        inputs = self.standardizer(xs)
        return in_float64(self.encoder, inputs) if xs.dtype == torch.float64 else self.encoder(inputs)

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
    """Return the embedding suffixes of a quantizer that reads `other` in addition to the one on the command line.

    Raises ConfigError if the two are equal.
    """
    if suffix == other:
        raise ConfigError(f"--embedding_suffix {suffix}", f"is already read by {quantizer}",
                          f"{quantizer} combines it with a text embedding", "use --embedding_suffix td")
    return [suffix, other]
