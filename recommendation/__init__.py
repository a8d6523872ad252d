"""The recommendation stage: recommenders, their training and evaluation, and the results.

    from recommendation import Recommender
"""

__all__ = ["Recommender"]


def __getattr__(name: str):
    if name == "Recommender":  # imported on first use, because loading torch is slow
        from recommendation.recommender import Recommender

        return Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
