"""A baseline that recommends the items with the most training events to every user."""

import torch
from torch import Tensor

from ..abstract_model import AbstractRecommender, Catalogue, HeldOut, Windows


class Popularity(AbstractRecommender):
    """A model in which the score of an item is the number of its training events."""

    needs_codes = False

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        self.register_buffer("counts", torch.zeros(catalogue.num_items))

    def fit(self, sequences: list[Tensor], validation: HeldOut) -> bool:
        items, _ = sequences
        self.counts = torch.bincount(items, minlength=self.catalogue.num_items).float()
        return True

    def score_items(self, histories: Windows) -> Tensor:
        return self.counts.expand(len(histories.items), -1)
