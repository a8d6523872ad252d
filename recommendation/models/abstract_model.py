"""The interface of a recommender."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from recommendation.decoding.top_k import PADDING, Recommendations, in_row
from recommendation.decoding.top_k import top_items as top_items  # for models that score every item

# B batch, W length of the longest window, N items, L levels, k items in a list,
# S largest number of seen items of a history


class Catalogue(NamedTuple):
    """The items that can be recommended."""

    num_items: int
    codes: Tensor | None        # (N, L) int64 semantic IDs, all different; None if the model needs none
    codebook_sizes: list[int]   # one per level


class Windows(NamedTuple):
    """Segments of users' sequences, oldest item first, padded at the end."""

    items: Tensor    # (B, W) int64, PADDING at the end of shorter rows
    lengths: Tensor  # (B,) int64, number of items in each row


class AbstractRecommender(nn.Module, ABC):
    """A model that reads histories of items and recommends the next items.

    `config` is the resolved configuration, with the sections `config["<name>"]["model_params"]`,
    `config["<name>"]["training_params"]` and `config["common"]`.
    """

    needs_codes = True

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__()
        self.config, self.catalogue = config, catalogue

    @abstractmethod
    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        """Return the `top_k` best items of the whole catalogue for each history. A history has at least one item."""

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        """Return the `top_k` best items for each history that are not in its row of `seen`.

        seen: (B, S) no duplicates in a row, PADDING at the end of shorter rows

        The scores are those of `recommend`. The default implementation calls `recommend` for longer lists and removes
        the seen items. Override it if longer lists are slower, or if the length changes the result, as in beam search.
        A subclass that overrides only `recommend` gets this default, not the `recommend_unseen` of its parent class.
        """
        num_items, num_seen = self.catalogue.num_items, (seen != PADDING).sum(dim=1)
        # Every list length needs its own call, because the result for a history must not depend on the rest of the
        # batch. Round up to powers of two, so that few lengths occur.
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
        if "recommend" in vars(cls) and "recommend_unseen" not in vars(cls):  # the parent's ignores the new method
            cls.recommend_unseen = AbstractRecommender.recommend_unseen  # type: ignore[method-assign]

    def item_embeddings(self) -> Tensor | None:
        """Return item vectors learned from the users' sequences, (N, D), or None if the model has none."""
        return None

    def prepare(self) -> None:
        """Build an index or similar data from the final weights, to make recommendation faster.

        Called before the test, and before recommending for more histories than items; it may take as long as
        recommending for N histories. The model must also work without it, as in validation, with results that are at
        least as good.
        """

    def properties(self) -> dict:
        """Return properties of the model to record in metrics.json, in addition to the metrics."""
        return {}

    # A model implements either `fit`, which trains it in one call, or `compute_loss`, to train it by gradient.

    def fit(self, sequences: list[Tensor]) -> bool:
        """Fit the model to the training sequences and return True, or return False if it is trained by gradient.

        sequences: `[items (E,), offsets (U + 1,)]`; user u has the training items `items[offsets[u]:offsets[u + 1]]`
        """
        return False

    @classmethod
    def trained_by_gradient(cls) -> bool:
        """Return whether the model is trained by gradient, that is, whether the class does not override `fit`."""
        return cls.fit is AbstractRecommender.fit

    @property
    def training_unit(self) -> Literal["target", "sequence"]:
        """The kind of windows that `compute_loss` gets.

        `target`: a history and one target, the last item of the row. Every training event is a target once per epoch.
        `sequence`: a segment of a user's sequence. Every item except the first is a target; a segment has at most
        `max_history` targets. The sequences are split at different points in every epoch.
        """
        return "target"

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Return `{"loss_total": <the loss to minimize>, ...}`, scalars that are means over the targets of the windows.

        With several processes, each gets a shard of the windows; the trainer weights a loss by its number of targets.
        """
        raise TypeError(f"{type(self).__name__} must implement `fit` or `compute_loss`")
