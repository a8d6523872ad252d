"""Residual quantization: each level quantizes the residual of the previous level."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from quantization.codebooks.codebook import Codebook, check_options

# B batch, H width, L levels, K codebook size


class Quantized(NamedTuple):
    """The result of quantizing a batch of latents."""

    latent: Tensor           # (B, H) sum of the codewords; passes gradients on to the encoder
    codes: Tensor            # (B, L)
    codebook_loss: Tensor    # () pulls the codewords to the residuals
    commitment_loss: Tensor  # () pulls the residuals to the codewords


class ResidualQuantizer(nn.Module):
    """L codebooks of K codewords, each of which quantizes the residual of the previous one.

    options: the resolved `codebook:` section of the configuration
    where: the path of this section, for error messages
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
        """Quantize latents (B, H).

        Each loss is summed over H and averaged over the batch, like the reconstruction loss.
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
        """Return the codes, computed in float64 and independent of the batch: (B, H) -> (B, L)."""
        return self._encode(latent.double())[0]

    def last_distances(self, latent: Tensor) -> Tensor:
        """Return the squared distances from the last level's residuals to its codewords: (B, H) -> (B, K)."""
        return self.codebooks[-1].distances(self._encode(latent.double())[1])

    def _encode(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (B, L), and the residuals (B, H) that the last level quantizes."""
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
        """Initialize each codebook from the residuals of the latents (N, H) at its level."""
        residual = latent
        for codebook in self.codebooks:
            codebook.start(residual, generator)
            residual = residual - codebook.lookup(codebook.nearest(residual))

    @torch.no_grad()
    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """Move codewords that were unused since the last call to the residuals of random latents (N, H)."""
        residual = latent
        for codebook in self.codebooks:
            after = residual - codebook.lookup(codebook.nearest_in_float32(residual))
            codebook.restart_dead(residual, generator)
            residual = after


def rotate(latent: Tensor, quantized: Tensor) -> Tensor:
    """Return the values of `quantized` (B, H) as a rotation and scaling of `latent`, which receives the gradient.

    The rotation trick (Fifty et al. 2024, arXiv 2410.06424): R = I - 2 r r^T + 2 q e^T with e = latent / |latent|,
    q = quantized / |quantized| and r = (e + q) / |e + q|. R is a constant in the backward pass.
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
