"""LETTER (Wang et al. 2024, arXiv 2405.07314): an RQ-VAE whose IDs also say who buys an item."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import check_name
from common.config import TrackedParams
from common.data_parallel import all_gather, mean_of_present, shard_rows
from common.errors import ConfigError
from quantization.codebooks.kmeans import kmeans
from quantization.codebooks.sizes import at_least_one

from .autoencoder import suffixes_with
from .rqvae import RQVAE

# B batch, D input width, H latent size, C width of the collaborative vectors, L levels, K codebook size


class LETTER(RQVAE):
    """RQ-VAE, and two losses: quantized items agree with their collaborative vectors, and codewords spread evenly.

    Items without a collaborative vector (their columns are zero) take no part in the first.
    """

    section = "letter"
    groups: Tensor  # (L, K)

    def __init__(self, config: dict, input_size: int):
        inputs = config["data"]["inputs"]
        *contents, collaborative = inputs.values()
        super().__init__(config, sum(contents))
        self.content_size = sum(contents)
        self.alignment_weight, self.diversity_weight = self.params["alignment_weight"], self.params["diversity_weight"]
        self.num_groups = _num_groups(self.params["num_groups"], min(self.codebook_sizes), f"{self.where}.num_groups")
        self.group_iterations = at_least_one(self.params["group_iterations"], f"{self.where}.group_iterations")
        self.collaborative = self.params["collaborative"]  # the suffix; its vectors are the last columns
        self.to_collaborative = nn.Linear(self.latent_size, collaborative, bias=False)
        self.register_buffer("groups", torch.zeros(len(self.codebook_sizes), self.codebook_sizes[0], dtype=torch.long))

    @classmethod
    def embedding_suffixes(cls, config: dict, suffix: str) -> list[str]:
        where = f"{cls.section}.model_params"
        collaborative = str(TrackedParams(config[cls.section]["model_params"], where)["collaborative"])
        check_name(f"{where}.collaborative", collaborative)
        return suffixes_with(suffix, collaborative, cls.section)

    def target(self, xs: Tensor) -> Tensor:
        return xs[:, :self.content_size]

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        content, collaborative = xs[:, :self.content_size], xs[:, self.content_size:]
        quantized = self.quantizer(self.encoder(self.standardizer(content)))
        loss = quantized.codebook_loss + self.commitment_cost * quantized.commitment_loss
        loss = loss + self.alignment_weight * self.alignment_loss(quantized.latent, collaborative)
        loss = loss + self.diversity_weight * self.diversity_loss(quantized.codes)
        return self.standardizer.undo(self.decoder(quantized.latent)), loss, quantized.codes

    def latent(self, xs: Tensor) -> Tensor:
        return super().latent(self.target(xs))

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        return super().compute_loss(forward_outputs, self.target(original_xs))

    def alignment_loss(self, latent: Tensor, collaborative: Tensor) -> Tensor:
        """(B, H), (B, C) -> (): each item's own vector against the batch's others (the paper's equation 5)."""
        everyone = all_gather(collaborative)  # those of other processes, too; they are data, and have no gradient
        present = everyone.abs().sum(dim=1) > 0
        logits = self.to_collaborative(latent) @ everyone.T
        logits = logits.masked_fill(~present, torch.finfo(logits.dtype).min)
        losses = F.cross_entropy(logits, torch.arange(len(everyone), device=logits.device)[shard_rows()],
                                 reduction="none")
        present = present[shard_rows()]
        return mean_of_present(torch.where(present, losses, 0.0), present)

    def diversity_loss(self, codes: Tensor) -> Tensor:
        """(B, L) -> (): a codeword is nearer to one of its group than to the others (the paper's equation 6)."""
        total = self.groups.new_zeros((), dtype=torch.float32)
        for codebook, groups, code in zip(self.quantizer.codebooks, self.groups, codes.T, strict=True):
            partner, alone = _partners(groups)
            logits = codebook.lookup(code) @ codebook.codewords.T                                   # (B, K)
            logits = logits.scatter(1, code.unsqueeze(1), torch.finfo(logits.dtype).min)            # not itself
            losses = F.cross_entropy(logits, partner[code], reduction="none")
            total = total + torch.where(alone[code], 0.0, losses).mean()
        return total

    @torch.no_grad()
    def initialize(self, xs: Tensor, generator: torch.Generator) -> None:
        super().initialize(self.target(xs), generator)
        self._regroup(generator)

    @torch.no_grad()
    def maintain(self, xs: Tensor, generator: torch.Generator) -> None:
        super().maintain(self.target(xs), generator)

    @torch.no_grad()
    def end_epoch(self, xs: Tensor, generator: torch.Generator) -> None:
        self._regroup(generator)

    def _regroup(self, generator: torch.Generator) -> None:
        """Group each level's codewords by k-means, the groups equally large."""
        for codebook, groups in zip(self.quantizer.codebooks, self.groups, strict=True):
            rows = codebook.codewords.detach()
            clusters = kmeans(rows, self.num_groups, self.group_iterations, generator,
                              max_size=-(-len(rows) // self.num_groups))
            groups.copy_(clusters.assign(rows))


def _num_groups(count: int | str, num_codewords: int, where: str) -> int:
    """`auto` is LETTER's 10, or as many as have two codewords each."""
    if count == "auto":
        return max(1, min(10, num_codewords // 2))
    number = at_least_one(count, where, wanted="auto or at least 1")
    if number > num_codewords:
        raise ConfigError(where, f"is {number}", f"there are only {num_codewords} codewords to group",
                          f"--num_groups auto, or {num_codewords} or fewer")
    return number


def _partners(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (K,) -> a random other codeword of each one's group (K,), and which are alone in theirs."""
    order = groups.argsort(stable=True)
    counts = torch.zeros_like(groups).index_add_(0, groups, torch.ones_like(groups))
    starts = counts.cumsum(0) - counts
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    count, start = counts[groups], starts[groups]
    step = 1 + (torch.rand(len(groups), device=groups.device) * (count - 1)).long()
    return order[start + (position - start + step) % count], count == 1
