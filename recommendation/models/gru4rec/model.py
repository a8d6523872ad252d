"""GRU4Rec (Hidasi et al. 2016, arXiv 1511.06939) with a softmax over the whole catalogue."""

from typing import Literal

from torch import Tensor, nn

from ..abstract_model import AbstractRecommender, Catalogue, Windows
from ..item_loss import item_loss
from ..layers import dropout
from ..params import Params

# B batch, W length of the longest window, M model width, N items


class GRU4Rec(AbstractRecommender):
    """A recurrent network (GRU) over the items of a history.

    The score of an item is the inner product of the item's embedding and the output after the last item. In training,
    every position predicts the next item. The loss is the cross-entropy over all items. The paper uses ranking losses
    with sampled negatives, and separate vectors for the input and the output.
    """

    needs_codes = False
    training_unit: Literal["sequence"] = "sequence"

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        params = Params(config, "gru4rec")
        self.label_smoothing = config["gru4rec"]["training_params"]["label_smoothing"]
        self.dropout, width = params.share("dropout"), params.count("d_model")
        self.items = nn.Embedding(catalogue.num_items, width)
        self.gru = nn.GRU(width, width, params.count("num_layers"))
        nn.init.normal_(self.items.weight, std=width**-0.5)

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        scores = self.encode(windows.items.T[:-1]) @ self.items.weight.T       # (W - 1, B, N)
        return {"loss_total": item_loss(scores, windows, self.label_smoothing)}

    def encode(self, items: Tensor) -> Tensor:
        """For each position, return the vector that predicts the next item: (W, B) items -> (W, B, M)."""
        x = dropout(self.items(items.clamp(min=0)), self.dropout, self.training)
        return dropout(self.gru(x)[0], self.dropout, self.training)

    def score_items(self, histories: Windows) -> Tensor:
        hidden = self.encode(histories.items.T)
        last = histories.newest(hidden)
        return last @ self.items.weight.T
