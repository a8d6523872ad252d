"""Residual quantization: each level quantizes the residual of the previous level."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from quantization.codebooks.codebook import Codebook, check_options

# B batch, H width, L levels, K codebook size


class Quantized(NamedTuple):
    """The result of quantizing a batch of latents."""

    latent: Tensor           # (B, H) sum of the chosen codewords; gradients flow through it to the encoder
    codes: Tensor            # (B, L)
    codebook_loss: Tensor    # () pulls the codewords towards the residuals
    commitment_loss: Tensor  # () pulls the residuals towards the codewords


class ResidualQuantizer(nn.Module):
    """L codebooks of K codewords. Each codebook quantizes the residual of the previous codebook.

    num_levels: the number of codebooks, L
    size: the number of codewords of each codebook, K
    width: the size of the latents, H
    options: the resolved `codebook:` section of the configuration
    where: the path of this section in the configuration, for error messages
    """

    def __init__(self, num_levels: int, size: int, width: int, options: dict, where: str):
        super().__init__()
        check_options(options, where, num_levels)
        self.gradient = options["gradient"]
        uniform = {level % num_levels for level in options["sinkhorn_levels"]}
        codebooks = nn.ModuleList(Codebook(size, width, options, level in uniform) for level in range(num_levels))
        self.codebooks = cast("Sequence[Codebook]", codebooks)

    @property
    def sizes(self) -> list[int]:
        return [len(codebook) for codebook in self.codebooks]

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize latents (B, H), and return the quantized latents, the codes and the losses.

        Each loss is a sum of squares over columns and levels, averaged over the batch.
        """
        residual, codes, quantized = latent, [], torch.zeros_like(latent)
        codebook_loss = commitment_loss = latent.new_zeros(())
        for codebook in self.codebooks:
            code, codeword = codebook.choose(residual)                                # (B,), (B, H)
            if not codebook.averaged:
                codebook_loss = codebook_loss + squared(codeword - residual.detach())
            commitment_loss = commitment_loss + squared(residual - codeword.detach())
            quantized = quantized + codeword
            residual = residual - codeword.detach()
            codes.append(code)
        return Quantized(self._pass_gradient(latent, quantized), torch.stack(codes, dim=1), codebook_loss,
                         commitment_loss)

    def get_codes(self, latent: Tensor) -> Tensor:
        """Return the codes of latents, computed in float64: (B, H) -> (B, L).

        The codes of a latent do not depend on the other latents in the batch.
        """
        return self._encode(latent.double())[0]

    def last_distances(self, latent: Tensor) -> Tensor:
        """For each latent, return the squared distances to the codewords of the last level: (B, H) -> (B, K).

        The distances are measured from the residual that the last level quantizes.
        """
        return self.codebooks[-1].distances(self._encode(latent.double())[1])

    def _encode(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize latents (B, H). Return the codes (B, L) and the residuals (B, H) that the last level quantizes."""
        codes, last_residual = [], residual
        for codebook in self.codebooks:
            last_residual = residual
            codes.append(codebook.nearest(residual))
            residual = residual - codebook.lookup(codes[-1])
        return torch.stack(codes, dim=1), last_residual

    def _pass_gradient(self, latent: Tensor, quantized: Tensor) -> Tensor:
        if self.gradient == "gumbel" and self.training:
            return quantized
        if self.gradient == "rotation" and self.training:
            return rotate(latent, quantized)
        return latent + (quantized - latent).detach()

    @torch.no_grad()
    def start(self, latent: Tensor, generator: torch.Generator) -> None:
        """Initialize the codebooks from latents of the data (N, H).

        Each codebook is initialized from the residuals of the previous codebook.
        """
        residual = latent
        for codebook in self.codebooks:
            codebook.start(residual, generator)
            residual = residual - codebook.lookup(codebook.nearest(residual))

    @torch.no_grad()
    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """Move unused codewords to the residuals of random latents; `latent` is (N, H).

        A codeword is unused if training has not chosen it since the last call of this method.
        """
        residual = latent
        for codebook in self.codebooks:
            after = residual - codebook.lookup(codebook.nearest_in_float32(residual))
            codebook.restart_dead(residual, generator)
            residual = after


def rotate(latent: Tensor, quantized: Tensor) -> Tensor:
    """Return the values of `quantized`, with a gradient that flows to `latent`: (B, H), (B, H) -> (B, H).

    This is the rotation trick (Fifty et al. 2024, arXiv 2410.06424). It rotates and scales each latent. The rotation is
    R = I - 2 r r^T + 2 q e^T with e = latent / |latent|, q = quantized / |quantized| and r = (e + q) / |e + q|. In the
    backward pass, R is a constant.
    """
    with torch.no_grad():
        length, target = latent.norm(dim=1, keepdim=True), quantized.norm(dim=1, keepdim=True)
        e, q = latent / length.clamp(min=1e-6), quantized / target.clamp(min=1e-6)
        r = torch.nn.functional.normalize(e + q, dim=1)
        scale = target / length.clamp(min=1e-6)
    along_r = (latent * r).sum(dim=1, keepdim=True)
    along_e = (latent * e).sum(dim=1, keepdim=True)
    return scale * (latent - 2 * along_r * r + 2 * along_e * q)


def squared(difference: Tensor) -> Tensor:
    """Return the mean squared length of the rows: (B, H) -> ()."""
    return difference.square().sum(dim=1).mean()
