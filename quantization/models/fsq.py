"""Finite scalar quantization (Mentzer et al. 2024, arXiv 2309.15505) with residual levels."""

import math
import reprlib

import torch
from torch import Tensor, nn

from common.artifacts import MAX_CODES
from common.errors import ConfigError
from quantization.codebooks.nearest import distances_exactly
from quantization.codebooks.residual import Quantized
from quantization.codebooks.sizes import at_least_one

from .autoencoder import AutoencoderVQ

# B batch, H latent size, L levels, K codebook size (product of the numbers of values of all latent dimensions)


class ResidualFSQ(nn.Module):
    """Residual finite scalar quantization (FSQ), without a trained codebook.

    Each latent dimension is mapped to the interval (-1, 1). Each level divides this interval into V equal parts and
    rounds the value to the midpoint of its part. The residual is multiplied by V, and the next level quantizes it in
    the same way. `num_values` contains the number V of each dimension.
    """

    num_values: Tensor  # (H,) number of values of each dimension
    places: Tensor      # (H,) a code is the sum of digit * place over the dimensions
    mean: Tensor        # (H,) mean of the latents
    deviation: Tensor   # (H,) standard deviation of the latents

    def __init__(self, num_levels: int, num_values: list[int]):
        super().__init__()
        self.num_levels, self.size = num_levels, math.prod(num_values)
        self.register_buffer("num_values", torch.tensor(num_values))
        self.register_buffer("places", torch.tensor([math.prod(num_values[:i]) for i in range(len(num_values))]))
        self.register_buffer("mean", torch.zeros(len(num_values)))
        self.register_buffer("deviation", torch.ones(len(num_values)))

    @property
    def sizes(self) -> list[int]:
        return [self.size] * self.num_levels

    def forward(self, latent: Tensor) -> Quantized:
        squashed = self._squash(latent)
        digits, _, residual = self._digits(squashed.detach())
        # Each level has multiplied the residual by V. The power is a float, because an integer could overflow.
        error = residual * self.num_values.to(residual.dtype).pow(-self.num_levels)
        zero = latent.new_zeros(())
        return Quantized(squashed - error, self._codes(digits), zero, zero)

    def get_codes(self, latent: Tensor) -> Tensor:
        return self._codes(self._digits(self._squash(latent.double()))[0])

    def last_distances(self, latent: Tensor) -> Tensor:
        """For each latent, return the squared distance to each of the K codes of the last level: (B, H) -> (B, K)."""
        _, last_inputs, _ = self._digits(self._squash(latent.double()))
        combinations = torch.arange(self.size, device=latent.device).unsqueeze(1) // self.places % self.num_values
        return distances_exactly(last_inputs, (2 * combinations.double() + 1) / self.num_values - 1)

    def _squash(self, latent: Tensor) -> Tensor:
        """Map latents to the interval (-1, 1).

        The results are uniformly distributed if the latents are normally distributed with the measured mean and
        standard deviation.
        """
        return torch.erf((latent - self.mean) / self.deviation / math.sqrt(2.0))

    def _digits(self, squashed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round squashed latents (B, H) in all levels.

        Return the digits (B, L, H), the last level's inputs (B, H), and the residuals after the last level (B, H). A
        digit is the index of the value that a dimension is rounded to.
        """
        position, largest, digits = (squashed + 1) / 2, self.num_values - 1, []  # `position` is in the interval (0, 1)
        for _ in range(self.num_levels):
            last_position, parts = position, position * self.num_values
            digits.append(parts.floor().clamp(min=0).minimum(largest))
            position = parts - digits[-1]
        return torch.stack(digits, dim=1).long(), 2 * last_position - 1, 2 * position - 1

    def _codes(self, digits: Tensor) -> Tensor:
        return (digits * self.places).sum(dim=-1)

    @torch.no_grad()
    def start(self, latent: Tensor, generator: torch.Generator) -> None:
        """Measure the mean and standard deviation of the latents (N, H)."""
        deviation, mean = torch.std_mean(latent, dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=1e-6))

    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """Measure the mean and standard deviation of the latents (N, H) again.

        Otherwise, a dimension whose standard deviation has become small would use only one value.
        """
        self.start(latent, generator)


class FSQ(AutoencoderVQ):
    """An autoencoder whose latent has only a few dimensions. Residual FSQ quantizes each dimension."""

    section = "fsq"

    def make_latent_size(self) -> int:
        values = self.params["num_values"]
        if not isinstance(values, list) or not values or any(type(v) is not int or v < 2 for v in values):
            raise ConfigError(f"{self.where}.num_values", "must be a list with one integer per latent dimension, "
                              f"each at least 2, got {reprlib.repr(values)}",
                              fix="use a list such as --num_values [4,4,4,4]")
        if math.prod(values) > MAX_CODES:
            raise ConfigError(f"{self.where}.num_values", f"{reprlib.repr(values)} gives a codebook of more than "
                              f"{MAX_CODES} codes", fix="use a list such as --num_values [4,4,4,4]")
        return len(values)

    def make_quantizer(self) -> ResidualFSQ:
        return ResidualFSQ(at_least_one(self.params["num_levels"], f"{self.where}.num_levels"),
                           self.params["num_values"])
