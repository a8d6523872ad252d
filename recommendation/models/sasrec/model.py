"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) with a softmax over the whole catalogue."""

from typing import Literal

from torch import Tensor, nn

from ..abstract_model import AbstractRecommender, Catalogue, Windows
from ..attention_bias import causal_bias
from ..item_loss import item_loss
from ..layers import FeedForward, RMSNorm, SelfAttention, dropout, initialize, stack
from ..params import Params

# B batch, W length of the longest window, M model width, N items


class SASRec(AbstractRecommender):
    """Causal self-attention over the items of a history.

    The score of an item is the inner product of the item's embedding and the output at the last position. In training,
    every position predicts the next item. The loss is the cross-entropy over all items. The loss of the paper, with
    sampled negatives, gives worse results (Klenitskiy and Vasilev 2023, arXiv 2309.07602). Unlike in the paper, the
    blocks are pre-norm and have no bias terms.
    """

    needs_codes = False
    training_unit: Literal["sequence"] = "sequence"

    def __init__(self, config: dict, catalogue: Catalogue):
        super().__init__(config, catalogue)
        params, training = Params(config, "sasrec"), config["sasrec"]["training_params"]
        self.label_smoothing = training["label_smoothing"]
        width, num_heads = params.heads()
        self.dropout = params.share("dropout")
        self.items = nn.Embedding(catalogue.num_items, width)
        self.positions = nn.Embedding(training["max_history"], width)
        self.layers = stack(params.count("num_layers"), lambda: (
            SelfAttention(width, num_heads, width // num_heads, self.dropout),
            FeedForward(width, params.count("d_ff"), self.dropout)))
        self.norm = RMSNorm(width)
        initialize(self, width, width // num_heads)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def compute_loss(self, windows: Windows) -> dict[str, Tensor]:
        """Return the mean cross-entropy of the next item over all positions."""
        scores = self.encode(windows.items.T[:-1]) @ self.items.weight.T       # (W - 1, B, N)
        return {"loss_total": item_loss(scores, windows, self.label_smoothing)}

    def encode(self, items: Tensor) -> Tensor:
        """For each position, return the vector that predicts the next item: (W, B) items -> (W, B, M)."""
        x = self.items(items.clamp(min=0)) + self.positions.weight[:len(items)].unsqueeze(1)
        x = dropout(x, self.dropout, self.training)
        bias = causal_bias(len(items), items.device)  # also hides the padding, which comes after all items
        for attention, feed_forward in self.layers:
            x = feed_forward(attention(x, bias))
        return self.norm(x)

    def score_items(self, histories: Windows) -> Tensor:
        hidden = self.encode(histories.items.T)
        last = histories.newest(hidden)
        return last @ self.items.weight.T

    def item_embeddings(self) -> Tensor:
        return self.items.weight
