"""The interface of a recommender."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from recommendation.decoding.top_k import PADDING, Recommendations, in_row
from recommendation.decoding.top_k import top_items as top_items  # for models: lists of dense scores

# B batch, W longest window, N items, L levels, k results, S most seen items of a history


class Catalogue(NamedTuple):
    """What is recommended from."""

    num_items: int
    codes: Tensor | None        # (N, L) int64 semantic IDs, no two alike; None if the model needs none
    codebook_sizes: list[int]   # one a level


class Windows(NamedTuple):
    """Stretches of users' sequences, oldest item first, padded behind."""

    items: Tensor    # (B, W) int64, PADDING behind each row's end
    lengths: Tensor  # (B,) int64


class AbstractRecommender(nn.Module, ABC):
    """A model that reads histories of items and names the items that may come next.

    `config` is the resolved YAML: `config["<name>"]["model_params"]`, `config["<name>"]["training_params"]`,
    `config["common"]`.
    """

    needs_codes = True

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__()
        self.config, self.catalogue = config, catalogue

    @abstractmethod
    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        """The `top_k` best items for each history (of at least one item), over the whole catalogue."""

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        """The `top_k` best items for each history that are not in its row of `seen`; scores are those of `recommend`.

        `seen` (B, S) has different items, PADDING behind each row's end. The default asks `recommend` for as many items
        more. A model whose lists cost more the longer they are, or depend on it as a beam search's do, should leave
        out the seen items itself. A class that overrides `recommend` alone gets the default.
        """
        num_items, num_seen = self.catalogue.num_items, (seen != PADDING).sum(dim=1)
        # Rounded up to a power of two, so that few calls serve all rows: one for each length of list, as what a history
        # gets must not depend on its neighbours.
        more = torch.where(num_seen > 0, 2 ** num_seen.clamp(min=1).double().log2().ceil(), 0).long()
        wanted = (top_k + more).clamp(max=max(num_items, top_k))
        items = seen.new_empty(len(seen), top_k)
        scores = torch.empty(items.shape, dtype=torch.float64, device=seen.device)
        for width in wanted.unique().tolist():
            rows = (wanted == width).nonzero()[:, 0]
            found, score = self.recommend(Windows(histories.items[rows], histories.lengths[rows]), width)
            left_out = in_row(seen[rows], found)
            order = left_out.long().argsort(dim=1, stable=True)[:, :top_k]  # what is left out goes behind the rest
            items[rows] = found.masked_fill(left_out, PADDING).gather(1, order)
            scores[rows] = score.double().masked_fill(left_out, float("-inf")).gather(1, order)
        return Recommendations(items, scores)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "recommend" in vars(cls) and "recommend_unseen" not in vars(cls):  # a parent's would not know of it
            cls.recommend_unseen = AbstractRecommender.recommend_unseen  # type: ignore[method-assign]

    def item_embeddings(self) -> Tensor | None:
        """A vector for every item, (N, D), that says what follows what; None if the model has none."""
        return None

    def prepare(self) -> None:
        """Build what makes recommending faster, such as an index, out of weights that will not change any more.

        Called before the test, and before use where there are more histories than items: the first N answers may pay
        for it. What is asked without it, such as in validation, gets answers that are no worse.
        """

    def properties(self) -> dict:
        """What metrics.json records of the model beside its figures: words that a reader of the run should know."""
        return {}

    # A model fits in one call, or is trained by gradient; it has one of these two.

    def fit(self, sequences: list[Tensor]) -> bool:
        """Fit to the training sequences in one call and return True, or return False.

        `sequences` is `[items (E,), offsets (U + 1,)]`: user u's training items are
        `items[offsets[u]:offsets[u + 1]]`.
        """
        return False

    @classmethod
    def trained_by_gradient(cls) -> bool:
        """Whether the class leaves `fit` as it is here."""
        return cls.fit is AbstractRecommender.fit

    @property
    def training_unit(self) -> Literal["target", "sequence"]:
        """What a window of `compute_loss` is.

        `target`: a history and, as the row's last item, the one target; every training event once an epoch.
        `sequence`: a stretch of a user's sequence, each item behind the first a target, at most
        `max_history` of them; cut at other places each epoch.
        """
        return "target"

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """`{"loss_total": what is minimized, ...}`, each a scalar, a mean over the windows' targets.

        Several processes compute it of a part of the windows each, and weight it by the part's number of targets.
        """
        raise TypeError(f"{type(self).__name__} neither fits in one call nor computes a loss")
