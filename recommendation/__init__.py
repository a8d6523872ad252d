"""The recommendation stage: recommenders, their training and evaluation, and the results.

    from recommendation import Recommender
"""

import sys

__all__ = ["Recommender"]

if sys.argv[:1] == ["-m"]:  # the command `python -m recommendation.results` begins with its imports
    from common.command import report_failed_imports

    report_failed_imports()


def __getattr__(name: str):
    if name == "Recommender":  # imported on first use, because loading torch is slow
        from recommendation.recommender import Recommender

        return Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
