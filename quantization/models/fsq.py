"""Finite scalar quantization (Mentzer et al. 2024, arXiv 2309.15505), level by level."""

import math

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from quantization.codebooks.nearest import distances_exactly
from quantization.codebooks.residual import Quantized
from quantization.codebooks.sizes import at_least_one

from .autoencoder import AutoencoderVQ

# B batch, H latent size (one number a scalar), L levels, K = product of the scalars' values


class ResidualFSQ(nn.Module):
    """Each level rounds every number of the latent to one of its few values; the next rounds what is left over.

    A squashed number lies in (-1, 1); a scalar of V values takes the middles of V equal parts of it, so that what
    is left over lies in (-1/V, 1/V), and V times that is the next level's number. There is no codebook to learn.
    """

    num_values: Tensor  # (H,)
    places: Tensor      # (H,) what one step of a number adds to the code
    mean: Tensor        # (H,)
    deviation: Tensor   # (H,)

    def __init__(self, num_levels: int, num_values: list[int]):
        super().__init__()
        self.num_levels = num_levels
        self.register_buffer("num_values", torch.tensor(num_values))
        self.register_buffer("places", torch.tensor([math.prod(num_values[:i]) for i in range(len(num_values))]))
        self.register_buffer("mean", torch.zeros(len(num_values)))
        self.register_buffer("deviation", torch.ones(len(num_values)))

    @property
    def sizes(self) -> list[int]:
        return [int(self.num_values.prod())] * self.num_levels

    def forward(self, latent: Tensor) -> Quantized:
        squashed = self._squash(latent)
        digits, _ = self._digits(squashed.detach())
        scale, quantized = torch.ones_like(squashed[0]), torch.zeros_like(squashed)
        for level in digits.unbind(dim=1):
            quantized = quantized + scale * self._middles(level)
            scale = scale / self.num_values
        none = latent.new_zeros(())
        return Quantized(squashed + (quantized - squashed).detach(), self._codes(digits), none, none)

    def get_codes(self, latent: Tensor) -> Tensor:
        return self._codes(self._digits(self._squash(latent.double()))[0])

    def last_distances(self, latent: Tensor) -> Tensor:
        """(B, H) -> (B, K) from what reaches the last level to the K combinations of values."""
        reaching = self._digits(self._squash(latent.double()))[1]
        combinations = torch.arange(self.sizes[-1], device=latent.device).unsqueeze(1) // self.places % self.num_values
        return distances_exactly(reaching, self._middles(combinations))

    def _squash(self, latent: Tensor) -> Tensor:
        """Into (-1, 1), evenly where the latent is normal with the mean and deviation that were measured last."""
        return torch.erf((latent - self.mean) / self.deviation / math.sqrt(2.0))

    def _digits(self, squashed: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers in [-1, 1] -> the values' indices (B, L, H), and the numbers that reach the last level (B, H)."""
        digits, left = [], squashed
        for _ in range(self.num_levels):
            reaching = left
            parts = (left + 1) / 2 * self.num_values
            digit = torch.minimum(parts.floor().clamp(min=0), self.num_values - 1).long()
            digits.append(digit)
            left = (left - self._middles(digit)) * self.num_values
        return torch.stack(digits, dim=1), reaching

    def _middles(self, digits: Tensor) -> Tensor:
        return (2 * digits + 1) / self.num_values - 1

    def _codes(self, digits: Tensor) -> Tensor:
        return (digits * self.places).sum(dim=-1)

    @torch.no_grad()
    def start(self, latent: Tensor, generator: torch.Generator) -> None:
        """Measure the latent, so that every value is used."""
        deviation, self.mean = torch.std_mean(latent, dim=0, correction=0)
        self.deviation = deviation.clamp(min=1e-6)

    def restart_dead(self, latent: Tensor, generator: torch.Generator) -> None:
        """There are no codewords that could die, but a number whose spread has gone would use one value alone."""
        self.start(latent, generator)


class FSQ(AutoencoderVQ):
    """An autoencoder with a latent of a few numbers, each rounded to a few values, level by level."""

    section = "fsq"

    def make_latent_size(self) -> int:
        values = self.params["num_values"]
        if not isinstance(values, list) or not values or any(type(v) is not int or v < 2 for v in values):
            raise ConfigError(f"{self.where}.num_values", f"is {values!r}", "it must be a list of numbers of at least "
                              "2, one for each scalar", "--num_values [4,4,4,4]")
        return len(values)

    def make_quantizer(self) -> ResidualFSQ:
        return ResidualFSQ(at_least_one(self.params["num_levels"], f"{self.where}.num_levels"),
                           self.params["num_values"])
