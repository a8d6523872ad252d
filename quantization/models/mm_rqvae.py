"""RQ-VAE of text and image embeddings. Both modalities share one latent and one set of codebooks."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from common.data_parallel import mean_of_present
from quantization.codebooks.layers import MLP, Standardizer, in_float64
from quantization.codebooks.residual import ResidualQuantizer
from quantization.codebooks.sizes import at_least_one, codebook_size, hidden_sizes

from .autoencoder import LatentVQ, suffixes_with

# B batch, D_m width of modality m, H latent size, L levels

IMAGE = "image"


class MMRQVAE(LatentVQ):
    """RQ-VAE with one encoder and one decoder per modality. The mean of the latents of all modalities is quantized.

    An item lacks a modality if the columns of the modality are zero. The latent and the loss of the item then ignore
    this modality.
    """

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        params, where = config["mm_rqvae"]["model_params"], "mm_rqvae.model_params"
        self.commitment_cost = config["mm_rqvae"]["training_params"]["commitment_cost"]
        self.widths = list(config["data"]["inputs"].values())
        latent_size = at_least_one(params["latent_size"], f"{where}.latent_size")
        standardizers = nn.ModuleList(Standardizer(width, params["standardize"]) for width in self.widths)
        self.standardizers = cast("Sequence[Standardizer]", standardizers)
        hidden = hidden_sizes(params["hidden_sizes"], where)
        layers = [[width, *hidden, latent_size] for width in self.widths]
        self.encoders = nn.ModuleList(MLP(widths) for widths in layers)
        self.decoders = nn.ModuleList(MLP(widths[::-1]) for widths in layers)
        size = codebook_size(params["codebook_size"], config["data"]["num_items"], where)
        self.quantizer = ResidualQuantizer(at_least_one(params["num_levels"], f"{where}.num_levels"), size,
                                           latent_size, params["codebook"], f"{where}.codebook")

    @classmethod
    def embedding_suffixes(cls, config: dict, suffix: str) -> list[str]:
        return suffixes_with(suffix, IMAGE, "mm_rqvae")

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized = self.quantizer(self.latent(xs))
        loss = quantized.codebook_loss + self.commitment_cost * quantized.commitment_loss
        parts = [standardizer.undo(decoder(quantized.latent))
                 for standardizer, decoder in zip(self.standardizers, self.decoders, strict=True)]
        return torch.cat(parts, dim=1), loss, quantized.codes

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        reconstruction, quantization_loss, _ = forward_outputs
        parts = zip(self.config["data"]["inputs"], reconstruction.split(self.widths, dim=1),
                    original_xs.split(self.widths, dim=1), self.standardizers, strict=True)
        losses = {f"recon_loss_{name}": self._recon_loss(output, target, standardizer)
                  for name, output, target, standardizer in parts}
        return {"loss_total": sum(losses.values()) + quantization_loss, **losses,
                "quantization_loss": quantization_loss}

    def latent(self, xs: Tensor) -> Tensor:
        total = count = xs.new_zeros(())
        for part, standardizer, encoder in zip(xs.split(self.widths, dim=1), self.standardizers, self.encoders,
                                               strict=True):
            present = _present(part)
            inputs = standardizer(part)
            latent = in_float64(encoder, inputs) if xs.dtype == torch.float64 else encoder(inputs)
            total, count = total + present * latent, count + present
        return total / count.clamp(min=1)

    def measure(self, xs: Tensor) -> None:
        for part, standardizer in zip(xs.split(self.widths, dim=1), self.standardizers, strict=True):
            rows = part[_present(part).squeeze(1) > 0]
            if len(rows):
                standardizer.measure(rows)

    def _recon_loss(self, output: Tensor, target: Tensor, standardizer: Standardizer) -> Tensor:
        present = _present(target).squeeze(1)
        errors = standardizer.scale(output - target).square().sum(dim=1)
        return mean_of_present(present * errors, present)


def _present(part: Tensor) -> Tensor:
    """Return 1 for each item that has the modality, and 0 for each other item: (B, D_m) -> (B, 1).

    part: the columns of the modality
    """
    return part.any(dim=1, keepdim=True).to(part.dtype)
