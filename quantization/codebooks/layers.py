"""Building blocks of quantizers: MLP, standardization, forward passes in float64, random rows."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

# N rows, D width

MAX_START_ROWS = 65_536  # maximum number of items that codebooks are initialized from
RESTART_ROWS = 2048      # sample that dead codewords restart from; with all items, restarts took a sixth of an epoch


class MLP(nn.Sequential):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, widths: list[int]):
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class Standardizer(nn.Module):
    """Scale columns to mean 0 and standard deviation 1, as measured by `measure`.

    Before `measure` is called, or if `active` is false, the columns do not change.
    """

    def __init__(self, width: int, active: bool):
        super().__init__()
        self.active = active
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, xs: Tensor) -> Tensor:
        """Standardize the columns: (N, D) -> (N, D)."""
        return (xs - self.mean) / self.deviation if self.active else xs

    def undo(self, xs: Tensor) -> Tensor:
        """Undo the standardization: (N, D) -> (N, D)."""
        return xs * self.deviation + self.mean if self.active else xs

    def scale(self, differences: Tensor) -> Tensor:
        """Divide differences (N, D) by the standard deviations of the columns."""
        return differences / self.deviation if self.active else differences

    @torch.no_grad()
    def measure(self, xs: Tensor) -> None:
        """Measure the mean and standard deviation of each column of xs (N, D).

        A constant column gets the deviation 1, to avoid a division by 0.
        """
        if not self.active:
            return
        deviation, self.mean = torch.std_mean(xs, dim=0, correction=0)
        self.deviation = torch.where(deviation > 1e-6 * (1 + self.mean.abs()), deviation, 1.0)


@torch.no_grad()
def in_float64(module: nn.Module, xs: Tensor) -> Tensor:
    """Return the output of the module for xs (N, D), computed in float64.

    In float32, the last digits of a row's output depend on the other rows in the batch, which can change its code.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    return functional_call(module, doubled, (xs.double(),))


def sample(xs: Tensor, generator: torch.Generator, count: int = MAX_START_ROWS) -> Tensor:
    """Return `count` random rows of xs, or xs itself if it has at most `count` rows."""
    if len(xs) <= count:
        return xs
    return xs[torch.randperm(len(xs), generator=generator)[:count].to(xs.device, non_blocking=True)]
