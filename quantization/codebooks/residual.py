"""Residual quantization: level by level, each level coding what is left over."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from quantization.codebooks.codebook import Codebook, check_options

# B batch, H width, L levels, K codebook size


class Quantized(NamedTuple):
    """The outcome of residual quantization of a batch."""

    latent: Tensor           # (B, H) sum of the codewords; its gradient is the encoder's
    codes: Tensor            # (B, L)
    codebook_loss: Tensor    # () pulls codewords to residuals
    commitment_loss: Tensor  # () pulls residuals to codewords


class ResidualQuantizer(nn.Module):
    """L codebooks of K codewords; the gradient that passes through them is one of the shared options.

    `options` are the resolved `codebook:` of the YAML, and `where` is their place for error messages.
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
        """(B, H) -> codes (B, L); every loss is summed over the latent's width, as the reconstruction is."""
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
        """(B, H) -> (B, L), in float64: the same codes whichever rows stand beside a row."""
        return self._walk(latent.double())[0]

    def last_distances(self, latent: Tensor) -> Tensor:
        """(B, H) -> (B, K) how far each row's last residual is from the last level's codewords."""
        return self.codebooks[-1].distances(self._walk(latent.double())[1])

    def _walk(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, L), and the residual (B, H) that reaches the last level."""
        codes, reaching = [], residual
        for codebook in self.codebooks:
            reaching = residual
            codes.append(codebook.nearest(residual))
            residual = residual - codebook.lookup(codes[-1])
        return torch.stack(codes, dim=1), reaching

    def _pass_gradient(self, latent: Tensor, quantized: Tensor) -> Tensor:
        if self.gradient == "gumbel" and self.training:
            return quantized
        if self.gradient == "rotation" and self.training:
            return rotate(latent, quantized)
        return latent + (quantized - latent).detach()

    @torch.no_grad()
    def start(self, latent: Tensor, generator: torch.Generator) -> None:
        """Start every codebook from the residuals (N, H) that reach it."""
        residual = latent
        for codebook in self.codebooks:
            codebook.start(residual, generator)
            residual = residual - codebook.lookup(codebook.nearest(residual))

    @torch.no_grad()
    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """Restart codewords that were not used since the last time at residuals of random rows of (N, H)."""
        residual = latent
        for codebook in self.codebooks:
            after = residual - codebook.lookup(codebook.nearest_in_float32(residual))
            codebook.restart_dead(residual, generator)
            residual = after


def rotate(latent: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` (B, H), as a rotation and a scaling of `latent`, through which the gradient passes.

    The rotation trick (Fifty et al. 2024, arXiv 2410.06424): R = I - 2 r r^T + 2 q e^T with unit e = latent,
    q = quantized and r = e + q; a constant of the backward pass.
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
    """(B, H) -> () squared length, mean over the batch."""
    return difference.square().sum(dim=1).mean()
