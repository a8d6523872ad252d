"""Transitions: which items come soon after the newest items of the history in training."""

from ..counting_model import CountingModel


class Transitions(CountingModel):
    """A baseline that counts which items come soon after an item in the training sequences.

    A Markov chain counts only the item that comes directly after the newest item. This model also counts later items,
    the opposite direction, and older items of the history, with lower weights.
    """

    name = "transitions"
    settings = ("pair_distance", "distance_decay", "backward", "source_exponent", "popularity_exponent", "num_newest",
                "recency")
