"""Residual quantization: each level quantizes the residual of the previous level."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
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
        self.gradient, self.averaged = options["gradient"], options["update"] == "ema"
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
        residual, inputs, codewords, codes = latent, [], [], []
        for codebook in self.codebooks:
            code, codeword = codebook.choose(residual)                                # (B,), (B, H)
            inputs.append(residual)
            codewords.append(codeword)
            codes.append(code)
            residual = residual - codeword.detach()
        # Compute the losses of all levels at once: on a GPU, a small operation takes as long as a large one.
        rows, chosen = torch.stack(inputs), torch.stack(codewords)                    # (L, B, H)
        codebook_loss = latent.new_zeros(()) if self.averaged else squared_distance(chosen, rows.detach())
        return Quantized(self._pass_gradient(latent, chosen, residual), torch.stack(codes, dim=1), codebook_loss,
                         squared_distance(rows, chosen.detach()))

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

    def _pass_gradient(self, latent: Tensor, codewords: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of the codewords (L, B, H), with a gradient that flows to `latent` (B, H): (B, H).

        residual: the difference between the latent and this sum, (B, H)
        """
        if self.gradient == "straight_through" or not self.training:
            return latent - residual.detach()
        quantized = codewords.sum(dim=0)
        return rotate(latent, quantized) if self.gradient == "rotation" else quantized

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


def squared_distance(rows: Tensor, targets: Tensor) -> Tensor:
    """Return the squared distance of rows to their targets, averaged over the batch: (B, H), (B, H) -> ().

    With several levels, (L, B, H), the distances of the levels are added.
    """
    return F.mse_loss(rows, targets, reduction="sum") / rows.shape[-2]
