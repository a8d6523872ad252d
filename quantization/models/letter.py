"""LETTER (Wang et al. 2024, arXiv 2405.07314): an RQ-VAE that also learns from collaborative vectors of the items."""

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
    """RQ-VAE with two additional losses, the alignment loss and the diversity loss.

    The alignment loss makes the quantized latent of an item similar to the item's collaborative vector. It ignores
    items without a collaborative vector (all zero). The diversity loss spreads the codewords evenly.
    """

    section = "letter"
    groups: Tensor  # (L, K) group of each codeword

    def __init__(self, config: dict, input_size: int):
        inputs = config["data"]["inputs"]
        *contents, collaborative = inputs.values()
        super().__init__(config, sum(contents))
        self.content_size = sum(contents)
        self.alignment_weight, self.diversity_weight = self.params["alignment_weight"], self.params["diversity_weight"]
        self.num_groups = _num_groups(self.params["num_groups"], min(self.codebook_sizes), f"{self.where}.num_groups")
        self.group_iterations = at_least_one(self.params["group_iterations"], f"{self.where}.group_iterations")
        self.collaborative = self.params["collaborative"]  # the suffix; this embedding has the last columns of `xs`
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
        """Return the contrastive loss of quantized latents and collaborative vectors: (B, H), (B, C) -> ().

        For each item, the positive is the collaborative vector of the item. The negatives are the collaborative vectors
        of the other items in the batch (equation 5 of the paper).
        """
        whole_batch = all_gather(collaborative)  # `all_gather` has no gradient, but these vectors do not need one
        present = whole_batch.any(dim=1)
        logits = self.to_collaborative(latent) @ whole_batch.T
        logits = logits.masked_fill(~present, torch.finfo(logits.dtype).min)
        losses = F.cross_entropy(logits, torch.arange(len(whole_batch), device=logits.device)[shard_rows()],
                                 reduction="none")
        present = present[shard_rows()]
        return mean_of_present(torch.where(present, losses, 0.0), present)

    def diversity_loss(self, codes: Tensor) -> Tensor:
        """Return the diversity loss, a contrastive loss of the codewords that the batch uses: (B, L) -> ().

        Each level contributes one loss. For each codeword in use, the positive is a random other codeword of the same
        group. The negatives are all other codewords of the level (equation 6 of the paper). A codeword that is alone in
        its group has no loss.
        """
        total = self.groups.new_zeros((), dtype=torch.float32)
        for codebook, groups, code in zip(self.quantizer.codebooks, self.groups, codes.T, strict=True):
            partner, alone = _partners(groups)
            logits = codebook.lookup(code) @ codebook.codewords.T                                   # (B, K)
            # Exclude the similarity of a codeword to itself.
            logits = logits.scatter(1, code.unsqueeze(1), torch.finfo(logits.dtype).min)
            losses = F.cross_entropy(logits, partner[code], reduction="none")
            total = total + losses.masked_fill(alone[code], 0.0).mean()
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
        """Divide the codewords of each level into groups of about equal size, with k-means."""
        # The limit of the group sizes needs many decisions on the host, so k-means runs on the CPU. Only this copy
        # waits for the GPU.
        codewords = torch.stack([codebook.codewords for codebook in self.quantizer.codebooks]).cpu()  # (L, K, H)
        groups = []
        for rows in codewords:
            clusters = kmeans(rows, self.num_groups, self.group_iterations, generator,
                              max_size=-(-len(rows) // self.num_groups))
            groups.append(clusters.assign(rows))
        self.groups.copy_(torch.stack(groups), non_blocking=True)


def _num_groups(count: int | str, num_codewords: int, where: str) -> int:
    """Return the number of groups of codewords per level.

    If `count` is "auto", the number is 10, as in the paper, but at most half the number of codewords.
    Raises ConfigError if `count` is neither "auto" nor an integer from 1 to `num_codewords`.
    """
    if count == "auto":
        return max(1, min(10, num_codewords // 2))
    number = at_least_one(count, where, wanted="auto or an integer of at least 1")
    if number > num_codewords:
        raise ConfigError(where, f"must be at most {num_codewords} (the number of codewords), got {number}",
                          fix=f"use --num_groups auto, or at most {num_codewords}")
    return number


def _partners(groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each codeword, draw a random other codeword of the same group.

    groups: (K,), the group of each codeword

    Return the drawn codewords (K,), and a bool (K,) that is True if a codeword is alone in its group. For such a
    codeword, the drawn codeword is the codeword itself.
    """
    order = groups.argsort(stable=True)
    counts = torch.zeros_like(groups).index_add_(0, groups, torch.ones_like(groups))
    starts = counts.cumsum(0) - counts
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    count, start = counts[groups], starts[groups]
    step = 1 + (torch.rand(len(groups), device=groups.device) * (count - 1)).long()
    return order[start + (position - start + step) % count], count == 1
