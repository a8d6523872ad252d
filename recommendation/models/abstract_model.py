"""The interface that every recommender implements."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from recommendation.decoding.top_k import PADDING, Recommendations, in_row
from recommendation.decoding.top_k import top_items as top_items  # re-exported for models that score every item

# B batch, W length of the longest window, N items, L levels, k items in a list,
# S largest number of seen items of a history, E training events, U users


class Catalogue(NamedTuple):
    """The items that can be recommended."""

    num_items: int
    codes: Tensor | None        # (N, L) int64 semantic IDs, all different; None if the model does not use semantic IDs
    codebook_sizes: list[int]   # one size per level


class Windows(NamedTuple):
    """A batch of segments of users' sequences. Each row has the oldest item first and is padded at the end."""

    items: Tensor    # (B, W) int64, PADDING at the end of shorter rows
    lengths: Tensor  # (B,) int64, number of items in each row


class AbstractRecommender(nn.Module, ABC):
    """A model that reads histories of items and recommends the next items.

    `config` is the resolved configuration. It has the sections `config["<name>"]["model_params"]`,
    `config["<name>"]["training_params"]` and `config["common"]`.
    """

    needs_codes = True  # whether the model uses semantic IDs

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__()
        self.config, self.catalogue = config, catalogue

    @abstractmethod
    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        """For each history, return the `top_k` best items of the catalogue. Every history has at least one item."""

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        """For each history, return the `top_k` best items that are not in the same row of `seen`.

        seen: (B, S) items to exclude, without duplicates in a row, and with PADDING at the end of shorter rows

        The scores must be the same as in `recommend`. The default calls `recommend` with a larger `top_k` and removes
        the seen items. Override this method if a larger `top_k` is slow or changes the result, as in beam search. A
        subclass that overrides only `recommend` gets this default.
        """
        num_items, num_seen = self.catalogue.num_items, (seen != PADDING).sum(dim=1)
        # A history that needs few extra items must not get a longer list because of another history in the batch: the
        # result could then depend on the batch. So call `recommend` once for each list length. Round the number of
        # extra items up to a power of two, so that few list lengths occur.
        num_extra = torch.where(num_seen > 0, 2 ** num_seen.clamp(min=1).double().log2().ceil(), 0).long()
        widths = (top_k + num_extra).clamp(max=max(num_items, top_k))
        items = seen.new_empty(len(seen), top_k)
        scores = torch.empty(items.shape, dtype=torch.float64, device=seen.device)
        for width in widths.unique().tolist():
            rows = (widths == width).nonzero()[:, 0]
            found, score = self.recommend(Windows(histories.items[rows], histories.lengths[rows]), width)
            is_seen = in_row(seen[rows], found)
            order = is_seen.long().argsort(dim=1, stable=True)[:, :top_k]  # moves the seen items to the end
            items[rows] = found.masked_fill(is_seen, PADDING).gather(1, order)
            scores[rows] = score.double().masked_fill(is_seen, float("-inf")).gather(1, order)
        return Recommendations(items, scores)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # The `recommend_unseen` of the parent class would not use the new `recommend`.
        if "recommend" in vars(cls) and "recommend_unseen" not in vars(cls):
            cls.recommend_unseen = AbstractRecommender.recommend_unseen  # type: ignore[method-assign]

    def item_embeddings(self) -> Tensor | None:
        """Return the learned vectors of all items, (N, vector size), or None if the model has no item vectors."""
        return None

    def prepare(self) -> None:
        """Build data that makes recommendation faster, for example an index.

        This method is called after training: before the test, and before recommending for more than `num_items`
        histories. It may take as long as recommending for `num_items` histories. Validation does not call it. If it
        is not called, recommendation may be slower, but the recommended items must be at least as good.
        """

    def find_problem(self) -> str:
        """Return what is wrong with the values that were loaded from a checkpoint, or "" if they are valid.

        The checkpoint may be damaged. Its keys, types and shapes fit the model, and its numbers are finite. Override
        this method if further values, such as wrong indices, would raise an error in `recommend`.
        """
        return ""

    def properties(self) -> dict:
        """Return properties of the model that are saved in metrics.json together with the metrics."""
        return {}

    # A model implements one of the next two methods. `fit` trains the model in one call. `compute_loss` is for models
    # that the trainer trains by gradient descent.

    def fit(self, sequences: list[Tensor]) -> bool:
        """Fit the model to the training sequences and return True.

        The default returns False. The model is then trained by gradient descent. `fit` must not change the types of
        buffers; it may change the shapes of buffers that were empty.

        sequences: two tensors, items (E,) and offsets (U + 1,). The training items of user u are
            `items[offsets[u]:offsets[u + 1]]`.
        """
        return False

    @classmethod
    def trained_by_gradient(cls) -> bool:
        """Return True if the class does not override `fit`. The model is then trained by gradient descent."""
        return cls.fit is AbstractRecommender.fit

    @property
    def training_unit(self) -> Literal["target", "sequence"]:
        """The kind of windows that the trainer passes to `compute_loss`.

        `target`: Each row is a history, followed by one target. In every epoch, each training event that has a history
        is the target of one row.
        `sequence`: Each row is a segment of a user's sequence. Every item of the row except the first is a target. A
        row has at most `max_history` targets. The sequences are split at different points in every epoch. The last rows
        of a batch may be empty: they have only PADDING, and the length 0.
        """
        return "target"

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Return the losses of a batch as `{"loss_total": <the loss to minimize>, ...}`.

        Each loss is a scalar, the mean over the targets of the windows. With several processes, each process gets a
        shard of the windows. The trainer weights the losses by the number of targets in each shard.

        On CUDA, the trainer records a step as a CUDA graph and replays it. This needs code that does not read values of
        tensors (`.item()`, `nonzero`, `if tensor`), does not use numbers of Python that change, and changes buffers
        only in place. Otherwise, the training uses normal steps, which are slower.
        """
        raise TypeError(f"{type(self).__name__} must implement `fit` or `compute_loss`")
