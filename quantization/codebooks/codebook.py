"""A codebook. The section `codebook:` of configs/defaults.yaml explains its options."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data_parallel import all_gather, all_reduce_sum, shard_rows
from common.errors import ConfigError
from common.precision import matmul_precision
from quantization.codebooks.kmeans import kmeans
from quantization.codebooks.nearest import directions, distances_exactly, nearest, nearest_exactly

# N rows, D width, K codewords


class Codebook(nn.Module):
    """A codebook of K codewords.

    The codewords are trained by gradient, or they are moving averages of the rows that choose them.

    A quantizer that uses a codebook must

    - call `start` once before training, with rows of the data,
    - call `choose` in `forward`,
    - call `nearest` in `get_codes`, with float64 rows,
    - call `restart_dead` in `maintain`,
    - with `update: gradient`, have a loss that pulls each codeword towards the rows that chose the codeword.
    """

    usage: Tensor   # (K,) how often each codeword was chosen in training since the last call of `restart_dead`
    counts: Tensor  # (K,) moving average of the number of rows per batch that choose each codeword
    sums: Tensor    # (K, D) moving average of the sum of the rows per batch that choose each codeword

    def __init__(self, size: int, width: int, options: dict, uniform: bool = False):
        """Create a codebook.

        size: the number of codewords
        width: the number of elements of a codeword
        options: the resolved `codebook:` section of the quantizer's configuration
        uniform: in training, choose all codewords about equally often (Sinkhorn)
        """
        super().__init__()
        self.options, self.uniform = options, uniform
        self.cosine, self.averaged = options["distance"] == "cosine", options["update"] == "ema"
        self.codewords = nn.Parameter(torch.empty(size, width), requires_grad=not self.averaged)
        nn.init.uniform_(self.codewords, -1.0 / size, 1.0 / size)
        self.register_buffer("usage", torch.zeros(size))
        if self.averaged:
            self.register_buffer("counts", torch.ones(size))
            self.register_buffer("sums", self.codewords.detach().clone())

    def __len__(self) -> int:
        return len(self.codewords)

    def nearest(self, rows: Tensor) -> Tensor:
        """Return the code of each row, which is the index of the nearest codeword: (N, D) -> (N,).

        The code of a row does not depend on the other rows.
        """
        return nearest_exactly(rows, self._compared())

    def nearest_in_float32(self, rows: Tensor) -> Tensor:
        """Return the code of each row, computed in float32: (N, D) -> (N,). Use this method only for training.

        If two codewords are almost equally near to a row, the code of the row may depend on the other rows.
        """
        return nearest(rows, self._compared())

    def distances(self, rows: Tensor) -> Tensor:
        """Return the squared distance from each row to each codeword: (N, D) -> float64 (N, K)."""
        return distances_exactly(rows, self._compared())

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a codeword for each row (N, D). Return the codes (N,) and the codewords (N, D).

        In training, the method also updates `usage` and the moving averages.
        """
        if not self.training:
            codes = self.nearest_in_float32(rows)
            return codes, self.lookup(codes)
        if self.options["gradient"] == "gumbel" and not self.uniform:
            codes, codewords = self._sample(rows)
        else:
            with torch.no_grad():
                codes = self._choose_uniformly_in_batch(rows) if self.uniform else self.nearest_in_float32(rows)
            codewords = self.lookup(codes)
        with torch.no_grad():
            counts = all_reduce_sum(torch.zeros_like(self.usage).scatter_(0, codes, 1.0, reduce="add"))
            self.usage.add_(counts)
            if self.averaged:
                self._average(counts, all_reduce_sum(torch.zeros_like(self.sums).index_add_(0, codes, rows)))
        return codes, codewords

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the codeword of each code: (N,) -> (N, D)."""
        return F.embedding(codes, self.codewords)

    @torch.no_grad()
    def start(self, rows: Tensor, generator: torch.Generator) -> None:
        """Initialize the codewords from rows of the data (N, D), with k-means or with random rows."""
        if self.options["start"] == "kmeans":
            clusters = kmeans(rows, len(self), self.options["kmeans_iterations"], generator, self.cosine)
            self._move(torch.ones(len(self), 1, dtype=torch.bool, device=rows.device), clusters.centroids)
        else:
            self._move(torch.ones(len(self), 1, dtype=torch.bool, device=rows.device),
                       rows[_draw(len(self), len(rows), generator).to(rows.device)])

    @torch.no_grad()
    def restart_dead(self, rows: Tensor, generator: torch.Generator) -> None:
        """Move each unused codeword to a random one of the rows (N, D), and set `usage` to 0.

        A codeword is unused if training has not chosen it since the last call of this method. With
        `restart_dead: false`, the method only sets `usage` to 0.
        """
        picks = _draw(len(self), len(rows), generator).to(rows.device, non_blocking=True)
        if self.options["restart_dead"]:
            self._move((self.usage == 0).unsqueeze(1), rows[picks])
        self.usage.zero_()

    def _compared(self) -> Tensor:
        return directions(self.codewords) if self.cosine else self.codewords

    def _move(self, moved: Tensor, rows: Tensor) -> None:
        self.codewords.copy_(torch.where(moved, rows, self.codewords))
        if self.averaged:
            self.counts.copy_(torch.where(moved.squeeze(1), 1.0, self.counts))
            self.sums.copy_(torch.where(moved, rows, self.sums))

    def _average(self, counts: Tensor, sums: Tensor) -> None:
        """Update the moving averages and the codewords (van den Oord et al. 2017, arXiv 1711.00937, appendix A).

        counts: (K,), the number of rows in the batch that chose each codeword
        sums: (K, D), the sum of these rows
        """
        decay = self.options["ema_decay"]
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        # Do not change codewords that are almost never chosen: the quotient of two tiny numbers would pull them to 0.
        chosen = self.counts.unsqueeze(1) > 1e-5
        self.codewords.copy_(torch.where(chosen, self.sums / self.counts.unsqueeze(1), self.codewords))

    @matmul_precision("ieee")
    def _sample(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a random code for each row with the Gumbel-softmax (arXiv 1611.01144).

        Return the codes (N,) and the codewords (N, D). The probabilities of the codes are the softmax of the negative
        squared distances. In the backward pass, the gradient is that of the Gumbel-softmax (straight-through
        estimator).
        """
        compared = self._compared()
        logits = 2 * rows @ compared.T - compared.square().sum(dim=1)
        chosen = F.gumbel_softmax(logits, tau=self.options["gumbel_temperature"], hard=True)
        return chosen.argmax(dim=1), chosen @ self.codewords

    def _choose_uniformly_in_batch(self, rows: Tensor) -> Tensor:
        """Return the codes of this process's rows: (N, D) -> (N,).

        All codes are about equally frequent in the whole batch of all processes.
        """
        return self._choose_uniformly(all_gather(rows))[shard_rows()]

    def _choose_uniformly(self, rows: Tensor) -> Tensor:
        """Return a code for each row, such that all codes are about equally frequent: (N, D) -> (N,)."""
        # Sinkhorn iterations solve this optimal transport problem approximately.
        costs = distances_exactly(rows, self._compared())
        costs = (costs - costs.amin(dim=1, keepdim=True)) / (costs.amax() - costs.amin()).clamp(min=1e-12)
        kernel = torch.exp(-costs / self.options["sinkhorn_epsilon"])                              # (N, K)
        per_code = torch.ones_like(kernel[0])
        for _ in range(self.options["sinkhorn_iterations"]):
            per_row = (kernel @ per_code).clamp(min=1e-300).reciprocal()
            per_code = (kernel.T @ per_row).clamp(min=1e-300).reciprocal()
        return (kernel * per_code).argmax(dim=1)


def check_options(options: dict, where: str, num_levels: int) -> None:
    """Check the options of a codebook.

    Raises ConfigError if an option has an invalid value, or if two options cannot be combined.
    """
    if options["gradient"] == "gumbel" and options["update"] == "ema":
        raise ConfigError(f"{where}.update", "ema cannot be combined with --gradient gumbel", "With ema, the "
                          "codewords are averages of rows; with gumbel, they are trained by gradient",
                          "use --update gradient, or --gradient straight_through")
    for key in ("sinkhorn_epsilon", "gumbel_temperature"):
        if options[key] <= 0:
            raise ConfigError(f"{where}.{key}", f"must be greater than 0, got {options[key]}", fix="correct the value")
    for level in options["sinkhorn_levels"]:
        if type(level) is not int or not -num_levels <= level < num_levels:
            raise ConfigError(f"{where}.sinkhorn_levels", f"unknown level {level!r}", f"There are {num_levels} levels, "
                              "numbered from 0; -1 is the last level", "correct the value")


def _draw(count: int, num_rows: int, generator: torch.Generator) -> Tensor:
    """Return `count` random row indices. The indices are distinct if `num_rows` is at least `count`."""
    picks = torch.randperm(num_rows, generator=generator)[:count]
    return picks if len(picks) == count else torch.cat([picks, torch.randint(num_rows, (count - len(picks),),
                                                                              generator=generator)])
