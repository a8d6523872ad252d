"""The loss of models that compute the score of every item."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .abstract_model import PADDING, Windows

# B batch, W length of the longest window, N items


def item_loss(scores: Tensor, windows: Windows, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy of the target of every position, with a softmax over all items.

    scores: (W - 1, B, N)

    With a teacher, the loss is the cross-entropy of the distribution of each target. This has less noise than targets
    that are drawn from the distribution.
    """
    distributions = windows.distributions()
    if distributions is None:
        return F.cross_entropy(scores.flatten(0, 1), windows.next_items().T.flatten(), ignore_index=PADDING,
                               label_smoothing=label_smoothing)
    items, shares = distributions                                                  # (W - 1, B, K) each
    log_probs = scores.log_softmax(dim=2)
    losses = -(log_probs.gather(2, items) * shares).sum(dim=2)
    if label_smoothing:
        losses = torch.lerp(losses, -log_probs.mean(dim=2), label_smoothing)
    counted = (windows.items[:, 1:] != PADDING).T
    return (losses * counted).sum() / counted.sum()
