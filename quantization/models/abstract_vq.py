"""The interface of quantizers: abstract methods, and optional methods with defaults."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

# B batch, D input width, L levels, N items


class AbstractVQ(nn.Module, ABC):
    """Base class of quantizers, which turn the embedding of an item into a tuple of discrete codes.

    `config` is the resolved configuration: `config["<name>"]["model_params"]`, `config["<name>"]["training_params"]`,
    `config["common"]`, and `config["data"]` with `num_items`, `inputs` (embedding suffix -> width) and `folder`.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(reconstruction (B, D), quantization loss (), codes (B, L))` of a batch (B, D)."""

    @abstractmethod
    def get_codes(self, xs: Tensor) -> Tensor:
        """Return the integer codes of a batch: (B, D) -> (B, L), or (B,) for one level.

        The codes of an item must not depend on randomness or on the other items in the batch.
        """

    @abstractmethod
    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        """Return `{"loss_total": loss to minimize, ...}` from the outputs of `forward`; all values are scalars.

        With several processes, each one computes the losses of its shard of the batch, and they are averaged with the
        numbers of rows as weights. This is correct for means over rows. A quantizer that computes anything else from a
        training batch must use the functions of common/data_parallel.py.
        """

    # The following methods are optional.

    @classmethod
    def embedding_suffixes(cls, config: dict, suffix: str) -> list[str]:
        """Return the suffixes of the embeddings to read. The default is `suffix`, the one on the command line.

        The columns of several embeddings are concatenated in `xs` (widths in `config["data"]["inputs"]`). If an item
        has no vector in one of them, its columns are zeros. Without an embedding, `xs` contains the item numbers, int64
        (N, 1), so that a model can look up the codes.
        """
        return [suffix]

    @classmethod
    def other_files(cls, config: dict) -> list[Path]:
        """Return files outside the dataset that the codes depend on. If their content changes, a new run starts."""
        return []

    def target(self, xs: Tensor) -> Tensor:
        """Return the columns of `xs` that `forward` reconstructs."""
        return xs

    def last_distances(self, xs: Tensor) -> Tensor | None:
        """Return the distances from each item to all codes of the last level: (B, D) -> (B, K), or None if unknown.

        Each item keeps its codes in the other levels. `--disambiguation reassign` moves items to the nearest free code;
        if this method returns None, it estimates the distances from the codes.
        """
        return None

    @property
    def codebook_sizes(self) -> list[int] | None:
        """The number of codes of each level, or None to infer it from the codes."""
        return None

    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        """Fit the model to all items (N, D) and return True, or return False to train it by gradient."""
        return False

    @classmethod
    def trained_by_gradient(cls) -> bool:
        """Return whether the class is trained by gradient, that is, does not override `fit`."""
        return cls.fit is AbstractVQ.fit

    def initialize(self, xs: Tensor, generator: torch.Generator) -> None:
        """Initialize the model from the data (N, D) before the first step, for example the codebooks by k-means."""

    def maintain(self, xs: Tensor, generator: torch.Generator) -> None:
        """Maintain the model during training, for example restart dead codewords; xs is (N, D).

        Called every 100 training steps, or once per epoch if an epoch is shorter. The call is at the beginning of a
        step, after the evaluation of the previous epoch (if any). The method should not wait for the device.
        """

    def end_epoch(self, xs: Tensor, generator: torch.Generator) -> None:
        """Update the model at the end of an epoch, before the evaluation (if any); xs is (N, D)."""
