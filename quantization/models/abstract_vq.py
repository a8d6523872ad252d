"""The interface of a quantizer: four methods to write, and some that may be overridden."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

# B batch, D input width, L levels, N items


class AbstractVQ(nn.Module, ABC):
    """A model that turns an item's embedding into a tuple of discrete codes.

    `config` is the resolved YAML: `config["<name>"]["model_params"]`, `config["<name>"]["training_params"]`,
    `config["common"]`; and `config["data"]` with `num_items`, `inputs` (embedding suffix -> width) and `folder`.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D) -> `(reconstruction (B, D), quantization loss (), codes (B, L))`."""

    @abstractmethod
    def get_codes(self, xs: Tensor) -> Tensor:
        """(B, D) -> integer codes (B, L), or (B,) for one level; the same whenever it is asked."""

    @abstractmethod
    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        """`{"loss_total": what is minimized, ...}` from what `forward` returned; each a scalar.

        Several processes call it for a part of the batch each, and average by the number of rows, which is right for
        means over rows. What else a quantizer does with a training batch needs common/data_parallel.py.
        """

    # What follows has working defaults.

    @classmethod
    def embedding_suffixes(cls, config: dict, suffix: str) -> list[str]:
        """The embeddings that are read: the one on the command line, others, several, or none.

        Several arrive side by side as the columns of `xs` (widths in `config["data"]["inputs"]`), zeros where an
        item has no vector of its own; with none, `xs` holds the items' numbers, int64 (N, 1), so that a model can
        look its codes up.
        """
        return [suffix]

    @classmethod
    def other_files(cls, config: dict) -> list[Path]:
        """Files beside the data set's that the codes depend on; a change of their content is another run."""
        return []

    def target(self, xs: Tensor) -> Tensor:
        """The part of `xs` that `forward` reconstructs."""
        return xs

    def last_distances(self, xs: Tensor) -> Tensor | None:
        """(B, D) -> (B, K) from each item to the codes of the last level, given its codes before; None: not known.

        Reassignment moves an item to the nearest free one; where it is not known, it is estimated from the codes.
        """
        return None

    @property
    def codebook_sizes(self) -> list[int] | None:
        """The number of codes of each level; None lets it be read off the codes."""
        return None

    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        """Fit in one call to all items (N, D) and return True, or return False to be trained by gradient."""
        return False

    @classmethod
    def trained_by_gradient(cls) -> bool:
        """Whether the class leaves `fit` as it is here."""
        return cls.fit is AbstractVQ.fit

    def initialize(self, xs: Tensor, generator: torch.Generator) -> None:
        """Start from the data (N, D), such as codebooks by k-means, before the first step."""

    def maintain(self, xs: Tensor, generator: torch.Generator) -> None:
        """Maintain the model, such as restarting dead codewords; xs is (N, D).

        Called every 100 training steps, or once an epoch if an epoch has fewer, before the next step: an evaluation
        that is due comes first. It should not wait for the device.
        """

    def end_epoch(self, xs: Tensor, generator: torch.Generator) -> None:
        """Update the model at the end of an epoch, before the evaluation if one is due; xs is (N, D)."""
