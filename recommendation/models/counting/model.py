"""Counting: transitions and items with similar content together."""

from recommendation.counting.search import Settings

from ..counting_model import CountingModel


class Counting(CountingModel):
    """A baseline that adds the weights of `transitions` and `neighbours`."""

    name = "counting"
    settings = Settings._fields
    needs_neighbours = True
