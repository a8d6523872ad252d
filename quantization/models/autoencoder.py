"""Base classes of quantizers that quantize a latent of each item, with or without an autoencoder."""

from typing import Protocol

import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.codebooks.layers import MLP, RESTART_ROWS, Standardizer, in_float64, sample
from quantization.codebooks.residual import Quantized, squared_distance
from quantization.codebooks.sizes import at_least_one, hidden_sizes

from .abstract_vq import AbstractVQ

# B batch, D input width, H latent size, L levels


class LatentQuantizer(Protocol):
    """The interface of modules that quantize latents, for example `ResidualQuantizer`."""

    @property
    def sizes(self) -> list[int]:
        """The number of possible codes of each level."""

    def __call__(self, latent: Tensor) -> Quantized:
        """Quantize latents (B, H), and return the quantized latents (B, H), the codes (B, L) and the two losses.

        Gradients must flow through the quantized latents to `latent`.
        """

    def get_codes(self, latent: Tensor) -> Tensor:
        """Return the codes of latents: float64 (B, H) -> (B, L).

        The codes of a latent must not depend on the other latents in the batch.
        """

    def last_distances(self, latent: Tensor) -> Tensor | None:
        """For each latent, return the distance to each of the K codes of the last level: float64 (B, H) -> (B, K).

        Return None if the distances are unknown.
        """

    def start(self, latent: Tensor, generator: torch.Generator) -> None:
        """Initialize the quantizer from latents of the data (N, H), before the first training step."""

    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """Move unused codewords to some of the latents (N, H).

        A codeword is unused if training has not chosen it since the last call of this method.
        """


class LatentVQ(AbstractVQ):
    """Base class of quantizers that compute a latent of each item, and quantize the latent with `self.quantizer`.

    A derived class must override `latent`.
    """

    standardizer: Standardizer
    quantizer: LatentQuantizer

    def measure(self, xs: Tensor) -> None:
        """Measure the mean and standard deviation of all items (N, D), before any latent is computed."""
        self.standardizer.measure(xs)

    def latent(self, xs: Tensor) -> Tensor:
        """Return the latents of items, in the precision of `xs`: (B, D) -> (B, H).

        In float64, the latent of an item must not depend on the other items in the batch.
        """
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

    A derived class must override `make_quantizer` and set `section`, the name of its section in the configuration. It
    may also override `make_latent_size` and `compute_loss`.

    `make_quantizer` can use these attributes:

    - `self.params`: the `model_params` of the section
    - `self.where`: the path of `model_params` in the configuration, for error messages
    - `self.latent_size`: the latent size H
    - `self.config["data"]["num_items"]`: the number of items

    The `model_params` of the section must have the keys `hidden_sizes`, `latent_size` and `standardize`. The key
    `latent_size` is not needed if `make_latent_size` is overridden.
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
        """Return the latent size H. This method is called before `make_quantizer`."""
        return at_least_one(self.params["latent_size"], f"{self.where}.latent_size")

    def make_quantizer(self) -> LatentQuantizer:
        """Create the module that quantizes latents of the size `self.latent_size`."""
        raise NotImplementedError

    def latent(self, xs: Tensor) -> Tensor:
        inputs = self.standardizer(xs)
        return in_float64(self.encoder, inputs) if xs.dtype == torch.float64 else self.encoder(inputs)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized = self.quantizer(self.encoder(self.standardizer(xs)))
        loss = quantized.codebook_loss + self.commitment_cost * quantized.commitment_loss
        return self.standardizer.undo(self.decoder(quantized.latent)), loss, quantized.codes

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        """Return the reconstruction loss, the quantization loss and their sum.

        `forward_outputs` contains the reconstruction (B, D), the quantization loss () and the codes (B, L).
        """
        reconstruction, quantization_loss, _ = forward_outputs
        recon_loss = squared_distance(self.standardizer.scale(reconstruction), self.standardizer.scale(original_xs))
        return {"loss_total": recon_loss + quantization_loss, "recon_loss": recon_loss,
                "quantization_loss": quantization_loss}


def suffixes_with(suffix: str, other: str, quantizer: str) -> list[str]:
    """Return `[suffix, other]`, the suffixes for a quantizer that reads two embeddings.

    suffix: the suffix on the command line
    other: the suffix of the embedding that the quantizer always reads
    quantizer: the name of the quantizer, for the error message

    Raises ConfigError if the two suffixes are equal.
    """
    if suffix == other:
        raise ConfigError(f"--embedding_suffix {suffix}", "must name a text embedding",
                          f"{quantizer} reads two embeddings: {other} and a text embedding",
                          "use --embedding_suffix td")
    return [suffix, other]
