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

    has_ordered_levels = True  # whether each level refines the levels before it; see `--disambiguation auto`

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
        """Return the losses as a dict of scalars. The loss to minimize has the key `loss_total`.

        forward_outputs: the result of `forward`
        original_xs: (B, D) the input of `forward`

        Each loss must be a mean over rows. With several processes, each process computes the losses of its shard of the
        batch, and the trainer averages them. If `forward` or a loss needs the whole batch, use the functions of
        common/data_parallel.py.

        On CUDA, the trainer records a step as a CUDA graph and replays it. This needs code that does not read values of
        tensors (`.item()`, `nonzero`, `if tensor`), does not use numbers of Python that change, and changes buffers
        only in place. Otherwise, the training uses normal steps, which are slower.
        """

    # The following methods are optional.

    @classmethod
    def embedding_suffixes(cls, config: dict, suffix: str) -> list[str]:
        """Return the suffixes of the embeddings that the quantizer reads.

        suffix: the value of `--embedding_suffix`

        By default, the quantizer reads the embedding with this suffix. With several embeddings, `xs` contains the
        columns of all of them, with the widths in `config["data"]["inputs"]`. If an embedding has no vector for an
        item, its columns are zero for this item. If the list is empty, `xs` contains the indices of the items, int64
        (N, 1).
        """
        return [suffix]

    @classmethod
    def other_files(cls, config: dict) -> list[Path]:
        """Return the paths of all files that the codes depend on and that are not part of the dataset.

        If the content of such a file has changed, the quantizer is trained again in a new run.
        """
        return []

    def target(self, xs: Tensor) -> Tensor:
        """Return the columns of `xs` that `forward` reconstructs. By default, these are all columns."""
        return xs

    def last_distances(self, xs: Tensor) -> Tensor | None:
        """For each item, return the distance to each of the K codes of the last level: (B, D) -> (B, K).

        `--disambiguation reassign` uses the distances to move items to the nearest free code of the last level. The
        default returns None. The distances are then estimated from the codes.
        """
        return None

    @property
    def codebook_sizes(self) -> list[int] | None:
        """The number of possible codes of each level, or None to infer the numbers from the codes."""
        return None

    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        """Fit the model to all items (N, D) at once, and return True.

        The default returns False. The model is then trained by gradient.
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

        The trainer calls this method every 100 training steps, or once per epoch if an epoch is shorter. The method
        should not wait for the GPU, and it should change buffers in place (`self.mean.copy_(mean)`): captured training
        steps use the memory of the buffers.
        """

    def end_epoch(self, xs: Tensor, generator: torch.Generator) -> None:
        """Update the model at the end of an epoch, before the evaluation (if any); `xs` (N, D) has all items."""
