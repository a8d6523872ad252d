"""The base class of all quantizers, with the methods that each quantizer must define or may override."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

# B batch, D input width, L levels, N items


class AbstractVQ(nn.Module, ABC):
    """Base class of quantizers. A quantizer turns the embedding of an item into a tuple of integer codes.

    `config` is the resolved configuration of the quantizer <name>. It contains:

    - `config["<name>"]["model_params"]` and `config["<name>"]["training_params"]`
    - `config["common"]`
    - `config["data"]["num_items"]`: the number of items
    - `config["data"]["inputs"]`: a dict from the suffix of each embedding to its width
    - `config["data"]["folder"]`: the `DatasetFolder` of the dataset
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a batch (B, D). Return the reconstruction (B, D), the quantization loss () and the codes (B, L)."""

    @abstractmethod
    def get_codes(self, xs: Tensor) -> Tensor:
        """Return the integer codes of a batch: (B, D) -> (B, L), or (B,) for one level.

        The codes of an item must not depend on randomness or on the other items in the batch.
        """

    @abstractmethod
    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        """Compute the losses from the outputs of `forward`, and return them as a dict of scalars.

        The loss to minimize has the key `loss_total`.

        With several processes, each process computes the losses of its shard of the batch. The trainer then averages
        the losses of all shards, weighted by their numbers of rows. This is correct if each loss is a mean over rows. A
        quantizer that computes anything else from a training batch must use the functions of common/data_parallel.py.
        """

    # The following methods are optional.

    @classmethod
    def embedding_suffixes(cls, config: dict, suffix: str) -> list[str]:
        """Return the suffixes of the embeddings that the quantizer reads.

        By default, the quantizer reads one embedding; its suffix is the flag `--embedding_suffix`. If there are several
        embeddings, `xs` contains the columns of all of them, with the widths in `config["data"]["inputs"]`. If an item
        has no vector in one of the embeddings, the columns of this embedding are zero for the item. If the list is
        empty, `xs` contains the numbers of the items, int64 (N, 1), so that a model can look up their codes.
        """
        return [suffix]

    @classmethod
    def other_files(cls, config: dict) -> list[Path]:
        """Return the paths of files outside the dataset that the codes depend on.

        If the content of such a file has changed, the quantizer is trained again in a new run.
        """
        return []

    def target(self, xs: Tensor) -> Tensor:
        """Return the columns of `xs` that `forward` reconstructs. By default, these are all columns."""
        return xs

    def last_distances(self, xs: Tensor) -> Tensor | None:
        """For each item, return the distance to each of the K codes of the last level: (B, D) -> (B, K).

        The codes of the item in the other levels stay the same. `--disambiguation reassign` uses the distances to move
        items to the nearest free code. By default, this method returns None, and the distances are estimated from the
        codes.
        """
        return None

    @property
    def codebook_sizes(self) -> list[int] | None:
        """The number of possible codes of each level. None means that the numbers are inferred from the codes."""
        return None

    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        """Fit the model to all items (N, D) at once, and return True.

        By default, this method does nothing and returns False, and the model is trained by gradient.
        """
        return False

    @classmethod
    def trained_by_gradient(cls) -> bool:
        """Return True if the model is trained by gradient. This is the case if the class does not override `fit`."""
        return cls.fit is AbstractVQ.fit

    def initialize(self, xs: Tensor, generator: torch.Generator) -> None:
        """Initialize the model from all items (N, D), for example the codebooks with k-means.

        The trainer calls this method before the first training step.
        """

    def maintain(self, xs: Tensor, generator: torch.Generator) -> None:
        """Do regular maintenance during training, for example restart dead codewords; `xs` (N, D) has all items.

        The trainer calls this method every 100 training steps, or once per epoch if an epoch is shorter. It calls the
        method at the beginning of a step, after the evaluation of the previous epoch (if any). The method should not
        wait for the GPU.
        """

    def end_epoch(self, xs: Tensor, generator: torch.Generator) -> None:
        """Update the model at the end of an epoch, before the evaluation (if any); `xs` (N, D) has all items."""
