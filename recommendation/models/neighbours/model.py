"""Neighbours: items whose content is similar to the newest items of the history."""

from ..counting_model import CountingModel


class Neighbours(CountingModel):
    """A baseline that recommends items with similar content (item-kNN on texts or embeddings).

    The weight of a pair is the squared cosine similarity of the two items, for the 30 nearest items of each item.
    """

    name = "neighbours"
    settings = ("num_newest", "recency", "neighbours_from")
    needs_neighbours = True
