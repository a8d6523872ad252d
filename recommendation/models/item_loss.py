"""The loss of models that compute the score of every item."""

import torch.nn.functional as F
from torch import Tensor

from .abstract_model import PADDING, Windows

# B batch, W length of the longest window, N items


def item_loss(scores: Tensor, windows: Windows, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy of the target of every position, with a softmax over all items.

    scores: (W - 1, B, N)

    If the teacher knows the distribution of the target at every position, the loss is the cross-entropy of this
    distribution. This has less noise than targets that are drawn from the distribution.
    """
    distributions, by_position = windows.distributions(), scores.flatten(0, 1)
    if distributions is None:
        return F.cross_entropy(by_position, windows.next_items().T.flatten(), ignore_index=PADDING,
                               label_smoothing=label_smoothing)
    losses = F.cross_entropy(by_position, distributions.flatten(0, 1), reduction="none",
                             label_smoothing=label_smoothing)
    counted = (windows.items[:, 1:] != PADDING).T.flatten()
    return (losses * counted).sum() / counted.sum()
