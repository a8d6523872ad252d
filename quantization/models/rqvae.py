"""RQ-VAE as in TIGER (Rajput et al. 2023, arXiv 2305.05065)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.errors import ConfigError

from .abstract_vq import AbstractVQ
from .layers import MLP, Codebook, kmeans

# B batch, D input width, H latent size, L levels, K codebook size

MAX_START_ROWS = 65_536  # items that k-means and restarts look at
IDS_PER_ITEM = 16        # a recommender reads and writes every level, so an ID should be no longer than it need be


class Quantized(NamedTuple):
    """The outcome of residual quantization of a batch."""

    latent: Tensor           # (B, H) sum of the codewords; its gradient is the encoder's (straight-through)
    codes: Tensor            # (B, L)
    codebook_loss: Tensor    # () pulls codewords to residuals
    commitment_loss: Tensor  # () pulls residuals to codewords


class RQVAE(AbstractVQ):
    """An autoencoder whose latent is coded level by level, each level coding what is left over."""

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        params = config["rqvae"]["model_params"]
        self.commitment_cost = config["rqvae"]["training_params"]["commitment_cost"]
        self.kmeans_iterations = params["kmeans_iterations"]
        num_items, latent_size = config["data"]["num_items"], params["latent_size"]
        size = _codebook_size(params["codebook_size"], num_items)
        num_levels = _num_levels(params["num_levels"], size, num_items)
        if type(latent_size) is not int or latent_size < 1:
            raise ConfigError("rqvae.model_params.latent_size", f"is {latent_size!r}", "it must be at least 1",
                              "correct the value")
        widths = [input_size, *params["hidden_sizes"], latent_size]
        self.encoder, self.decoder = MLP(widths), MLP(widths[::-1])
        self.codebooks = nn.ModuleList(Codebook(size, latent_size) for _ in range(num_levels))

    @property
    def codebook_sizes(self) -> list[int]:
        return [len(codebook.codewords) for codebook in self.codebooks]

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized = self.quantize(self.encoder(xs))
        loss = quantized.codebook_loss + self.commitment_cost * quantized.commitment_loss
        return self.decoder(quantized.latent), loss, quantized.codes

    def get_codes(self, xs: Tensor) -> Tensor:
        return self.quantize(self.encoder(xs)).codes

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        reconstruction, quantization_loss, _ = forward_outputs
        recon_loss = (reconstruction - original_xs).square().sum(dim=1).mean()
        return {"loss_total": recon_loss + quantization_loss, "recon_loss": recon_loss,
                "quantization_loss": quantization_loss}

    def quantize(self, latent: Tensor) -> Quantized:
        """(B, H) -> codes (B, L); every loss is summed over the latent's width, as the reconstruction is."""
        residual, codes = latent, []
        codebook_loss = commitment_loss = latent.new_zeros(())
        for codebook in self.codebooks:
            code = codebook.nearest(residual)                                         # (B,)
            codeword = codebook.lookup(code)                                          # (B, H)
            codebook_loss = codebook_loss + _squared(codeword - residual.detach())
            commitment_loss = commitment_loss + _squared(residual - codeword.detach())
            residual = residual - codeword.detach()
            codes.append(code)
            if self.training:
                codebook.count(code)
        # Straight-through: the value is the codewords' sum, the gradient the latent's.
        return Quantized(latent - residual.detach(), torch.stack(codes, dim=1), codebook_loss, commitment_loss)

    @torch.no_grad()
    def initialize(self, xs: Tensor, generator: torch.Generator) -> None:
        """Start every codebook from k-means on the residuals that reach it."""
        residual = self.encoder(_sample(xs, generator))
        for codebook in self.codebooks:
            codebook.codewords.copy_(kmeans(residual, len(codebook.codewords), self.kmeans_iterations, generator))
            residual = residual - codebook.lookup(codebook.nearest(residual))

    @torch.no_grad()
    def end_epoch(self, xs: Tensor, generator: torch.Generator) -> None:
        """Restart codewords that the epoch did not use at residuals of random items."""
        residual = self.encoder(_sample(xs, generator))
        for codebook in self.codebooks:
            after = residual - codebook.lookup(codebook.nearest(residual))
            codebook.restart_dead(residual, generator)
            residual = after


def _squared(difference: Tensor) -> Tensor:
    return difference.square().sum(dim=1).mean()


def _sample(xs: Tensor, generator: torch.Generator) -> Tensor:
    if len(xs) <= MAX_START_ROWS:
        return xs
    return xs[torch.randperm(len(xs), generator=generator)[:MAX_START_ROWS].to(xs.device)]


def _codebook_size(size: int | str, num_items: int) -> int:
    """`auto` is the largest power of two up to a quarter of the items, at most 256."""
    if size == "auto":
        return max(2, min(256, 1 << (max(num_items // 4, 1).bit_length() - 1)))
    if type(size) is not int or size < 1:  # a bool is an int, too
        raise ConfigError("rqvae.model_params.codebook_size", f"is {size!r}", "it must be auto or at least 1",
                          "--codebook_size auto")
    if size > num_items:
        raise ConfigError("rqvae.model_params.codebook_size", f"is {size}", f"there are only {num_items} items",
                          "--codebook_size auto, or a smaller number")
    return size


def _num_levels(num_levels: int | str, codebook_size: int, num_items: int) -> int:
    """`auto` is the fewest levels, but two at least, that offer IDS_PER_ITEM IDs for every item."""
    if num_levels == "auto":
        return max(2, math.ceil(math.log(IDS_PER_ITEM * num_items, max(codebook_size, 2)) - 1e-9))
    if type(num_levels) is not int or num_levels < 1:  # a bool is an int, too
        raise ConfigError("rqvae.model_params.num_levels", f"is {num_levels!r}", "it must be auto or at least 1",
                          "--num_levels auto")
    return num_levels
