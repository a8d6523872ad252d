"""Parts of quantizers: an MLP, a standardizer, forward passes in float64, and random samples of rows."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

# N rows, D width

MAX_START_ROWS = 65_536  # codebooks are initialized from at most this number of items
# Dead codewords move to items of a random sample of this size. With all items, restarts took a sixth of an epoch.
RESTART_ROWS = 2048


class MLP(nn.Sequential):
    """A multilayer perceptron: linear layers of the given widths, with a ReLU between two layers."""

    def __init__(self, widths: list[int]):
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class Standardizer(nn.Module):
    """Shift and scale each column to mean 0 and standard deviation 1.

    `measure` computes the means and standard deviations. Before the first call of `measure`, and if `active` is false,
    the module does not change the columns.
    """

    mean: Tensor       # (D,)
    deviation: Tensor  # (D,) standard deviation

    def __init__(self, width: int, active: bool):
        super().__init__()
        self.active = active
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, xs: Tensor) -> Tensor:
        """Standardize the columns: (N, D) -> (N, D)."""
        return (xs - self.mean) / self.deviation if self.active else xs

    def undo(self, xs: Tensor) -> Tensor:
        """Convert standardized columns back to the original values: (N, D) -> (N, D)."""
        return xs * self.deviation + self.mean if self.active else xs

    def scale(self, differences: Tensor) -> Tensor:
        """Divide differences between rows by the standard deviation of each column: (N, D) -> (N, D)."""
        return differences / self.deviation if self.active else differences

    @torch.no_grad()
    def measure(self, xs: Tensor) -> None:
        """Compute and store the mean and the standard deviation of each column of `xs` (N, D).

        For a constant column, the stored standard deviation is 1, to avoid a division by 0.
        """
        if not self.active:
            return
        deviation, mean = torch.std_mean(xs, dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0))


@torch.no_grad()
def in_float64(module: nn.Module, xs: Tensor) -> Tensor:
    """Apply the module to `xs` (N, D) in float64, and return the output.

    In float32, the last digits of the output for a row depend on the other rows in the batch. This can change the code
    of the row.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    return functional_call(module, doubled, (xs.double(),))


def sample(xs: Tensor, generator: torch.Generator, count: int = MAX_START_ROWS) -> Tensor:
    """Return `count` random rows of `xs`, or `xs` itself if there are at most `count` rows."""
    if len(xs) <= count:
        return xs
    return xs[torch.randperm(len(xs), generator=generator)[:count].to(xs.device, non_blocking=True)]
