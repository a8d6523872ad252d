"""Base class of quantizers that store the codes of all items in a table."""

import torch
from torch import Tensor

from .abstract_vq import AbstractVQ

# B batch, N items, L levels


class TableVQ(AbstractVQ):
    """A quantizer that looks up the codes of items in a table and does not read an embedding.

    A derived class must register the table as the buffer `codes`. The argument `xs` of the methods contains the indices
    of the items, int64 (B, 1), instead of embeddings.
    """

    codes: Tensor  # int64 (N, L)

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
