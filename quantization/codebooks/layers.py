"""Building blocks of quantizers: the autoencoder's layers, passes that do not depend on the batch, random rows."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

# N rows, D width

MAX_START_ROWS = 65_536  # items that k-means looks at
RESTART_ROWS = 2048      # items that dead codewords restart from; all of them would cost a sixth of it


class MLP(nn.Sequential):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, widths: list[int]):
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class Standardizer(nn.Module):
    """Columns to mean 0 and deviation 1 as measured by `measure`; until then, and if switched off, they stay."""

    def __init__(self, width: int, active: bool):
        super().__init__()
        self.active = active
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, xs: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return (xs - self.mean) / self.deviation if self.active else xs

    def undo(self, xs: Tensor) -> Tensor:
        return xs * self.deviation + self.mean if self.active else xs

    def scale(self, differences: Tensor) -> Tensor:
        """Differences of columns (N, D) in units of their deviations."""
        return differences / self.deviation if self.active else differences

    @torch.no_grad()
    def measure(self, xs: Tensor) -> None:
        """A column that is constant keeps deviation 1, so that nothing is divided by 0."""
        if not self.active:
            return
        deviation, self.mean = torch.std_mean(xs, dim=0, correction=0)
        self.deviation = torch.where(deviation > 1e-6 * (1 + self.mean.abs()), deviation, 1.0)


@torch.no_grad()
def in_float64(module: nn.Module, xs: Tensor) -> Tensor:
    """What the module makes of (N, D), in float64.

    In float32 a row's result depends in its last digits on the rows beside it, and a code may flip; here it does not.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    return functional_call(module, doubled, (xs.double(),))


def sample(xs: Tensor, generator: torch.Generator, count: int = MAX_START_ROWS) -> Tensor:
    """`count` random rows, or all where there are no more."""
    if len(xs) <= count:
        return xs
    return xs[torch.randperm(len(xs), generator=generator)[:count].to(xs.device, non_blocking=True)]
