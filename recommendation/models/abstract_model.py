"""The interface that every recommender implements."""

from abc import ABC
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from recommendation.decoding.top_k import PADDING, Prior, Recommendations, in_row
from recommendation.decoding.top_k import top_items as top_items  # re-exported for models that score every item

# B batch, W length of the longest window, N items, L levels, k items in a list, G neighbors of an item,
# S largest number of seen items of a history, E events, U users, V validation events


class ItemNeighbours(NamedTuple):
    """For each item, the items with the most similar content, without the item itself.

    An item with the weight 0 has no meaning: fewer items are similar.
    """

    items: Tensor   # (N, G) int64
    weights: Tensor  # (N, G) float32, squared cosine similarities


class Catalogue(NamedTuple):
    """The items that can be recommended."""

    num_items: int
    codes: Tensor | None        # (N, L) int64 semantic IDs, all different; None if the model does not use semantic IDs
    codebook_sizes: list[int]   # one size per level
    neighbours: dict[str, ItemNeighbours] | None = None  # source -> neighbours; None if the model does not use them
    group_of: np.ndarray | None = None  # (N,) number of the ID before disambiguation; None if no two items collide


class Teacher(Protocol):
    """A source of other targets for the training (see `recommendation.counting.teacher`)."""

    num_calls: int  # number of calls of the methods

    def draw(self, events: Tensor, targets: Tensor) -> Tensor:
        """Replace some of the targets, the items of the events, by drawn items: (B, G) -> (B, G)."""

    def distributions(self, events: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution of each target: (B, G) -> items and probabilities, (B, G, K) each."""


class Windows(NamedTuple):
    """A batch of segments of users' sequences. Each row has the oldest item first and is padded at the end."""

    items: Tensor    # (B, W) int64, PADDING at the end of shorter rows
    lengths: Tensor  # (B,) int64, number of items in each row
    starts: Tensor | None = None    # (B,) int64, index of the first event of each row; only for a teacher
    teacher: Teacher | None = None  # only in training

    def newest(self, values: Tensor) -> Tensor:
        """Return the values at the newest item of each row: (W, B, any size) -> (B, any size)."""
        return values[self.lengths - 1, torch.arange(values.shape[1], device=values.device)]

    def next_items(self) -> Tensor:
        """Return the target of every position, for the training unit `sequence`: (B, W - 1), with PADDING at the end.

        With a teacher, some of the targets are items that the teacher has drawn.
        """
        targets = self.items[:, 1:]
        return targets if self.teacher is None else self.teacher.draw(self._events(), targets)

    def distributions(self) -> tuple[Tensor, Tensor] | None:
        """Return the distribution of the target of every position, for the training unit `sequence`.

        The two results, (W - 1, B, K) each, are items and their probabilities. A target that is PADDING has a
        distribution without meaning. Without a teacher, return None.
        """
        if self.teacher is None:
            return None
        items, shares = self.teacher.distributions(self._events(), self.items[:, 1:])
        return items.transpose(0, 1), shares.transpose(0, 1)

    def _events(self) -> Tensor:
        """Return the index of the event of each target of the unit `sequence`: (B, W - 1)."""
        assert self.starts is not None
        return self.starts.unsqueeze(1) + torch.arange(1, self.items.shape[1], device=self.items.device)

    def split_last(self) -> tuple[Tensor, Tensor]:
        """Return the history and the target of each row, for the training unit `target`: (B, W - 1) and (B, 1).

        With a teacher, some of the targets are items that the teacher has drawn.
        """
        last = self.lengths.unsqueeze(1) - 1
        target, history = self.items.gather(1, last), self.items.scatter(1, last, PADDING)[:, :-1]
        if self.teacher is not None:
            assert self.starts is not None
            target = self.teacher.draw(self.starts.unsqueeze(1) + last, target)
        return history, target


class HeldOut(NamedTuple):
    """The validation events. The history of event v is `items[starts[v]:ends[v]]`, and the target `items[ends[v]]`."""

    items: Tensor   # (E,) the events of all users
    starts: Tensor  # (V,)
    ends: Tensor    # (V,)


class AbstractRecommender(nn.Module, ABC):
    """A model that reads histories of items and recommends the next items.

    `config` is the resolved configuration. It has the sections `config["<name>"]["model_params"]`,
    `config["<name>"]["training_params"]` and `config["common"]`.
    """

    needs_codes = True  # whether the model uses semantic IDs
    # Whether the model uses the content of the items. Only a model with `fit` can use it; its YAML must have
    # `uses: [neighbours_from]`.
    needs_neighbours = False

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__()
        self.config, self.catalogue = config, catalogue

    # A model implements `score_items`, or `recommend`, or both.

    def score_items(self, histories: Windows) -> Tensor:
        """Return the score of every item for each history: (B, N).

        For a model that is trained by gradient descent, a score is the log-probability of the item, plus any constant
        per history. The default takes the scores from `recommend`. Items that `recommend` does not return get -inf.
        """
        if type(self).recommend is AbstractRecommender.recommend:
            raise TypeError(f"{type(self).__name__} must implement `score_items` or `recommend`")
        items, scores = self.recommend(histories, self.catalogue.num_items)
        by_item = scores.new_full((len(items), self.catalogue.num_items + 1), float("-inf"))
        return by_item.scatter(1, items.masked_fill(items == PADDING, self.catalogue.num_items), scores)[:, :-1]

    def recommend(self, histories: Windows, top_k: int) -> Recommendations:
        """For each history, return the `top_k` best items of the catalogue. Every history has at least one item."""
        return top_items(self.score_items(histories), top_k)

    def recommend_with_prior(self, histories: Windows, prior: Prior, seen: Tensor | None,
                             top_k: int) -> Recommendations:
        """For each history, return the `top_k` best items if `prior` is added to the scores of `score_items`.

        seen: (B, S) items to exclude as in `recommend_unseen`, or None
        """
        return top_items(self.score_items(histories) + prior.added(), top_k, seen)

    def recommend_unseen(self, histories: Windows, seen: Tensor, top_k: int) -> Recommendations:
        """For each history, return the `top_k` best items that are not in the same row of `seen`.

        seen: (B, S) items to exclude, without duplicates in a row, and with PADDING at the end of shorter rows

        The scores must be the same as in `recommend`. Exception: models with separate settings for unseen items.
        If the model does not implement `score_items`, the default calls `recommend` with a larger `top_k` and removes
        the seen items. Override this method if a larger `top_k` is slow or changes the result, as in beam search.
        """
        if type(self).score_items is not AbstractRecommender.score_items:
            return top_items(self.score_items(histories), top_k, seen)
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
        # The methods of a parent class would not use the new `score_items` or `recommend`, so they become the defaults.
        if not vars(cls).keys() & {"score_items", "recommend"}:
            return
        for name in {"score_items", "recommend", "recommend_unseen", "recommend_with_prior"} - vars(cls).keys():
            setattr(cls, name, getattr(AbstractRecommender, name))

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

    def fit(self, sequences: list[Tensor], validation: HeldOut) -> bool:
        """Fit the model to the training sequences and return True.

        The default returns False. The model is then trained by gradient descent. `fit` must not change the types of
        buffers; it may change the shapes of buffers that were empty.

        sequences: two tensors, items (E,) and offsets (U + 1,). The training items of user u are
            `items[offsets[u]:offsets[u + 1]]`.
        validation: the validation events, only for the choice of settings
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

        `Windows.split_last` and `Windows.next_items` return the targets of the two units.
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
