"""Codes that stand in a table, one row an item: nothing is read of an embedding, nothing is trained."""

import torch
from torch import Tensor

from .abstract_vq import AbstractVQ

# B batch, N items, L levels


class TableVQ(AbstractVQ):
    """A derived class registers the buffer `codes`, int64 (N, L); `xs` holds the items' numbers (B, 1)."""

    codes: Tensor

    @classmethod
    def embedding_suffixes(cls, config: dict, suffix: str) -> list[str]:
        return []

    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        return True

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return xs, torch.zeros((), device=xs.device), self.get_codes(xs)

    def get_codes(self, xs: Tensor) -> Tensor:
        return self.codes[xs.squeeze(1)]

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        return {"loss_total": forward_outputs[1]}
