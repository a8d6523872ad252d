"""Which events train a model and which judge it."""

from typing import NamedTuple

from common.artifacts import SPLITS
from common.errors import DataError
from dataloader.filters import Report
from dataloader.options import Processing
from dataloader.workspace import Workspace


class Split(NamedTuple):
    """SQL for an event's split, over the columns of `numbered`; and what the next stage may want to know of it."""

    expression: str
    info: dict


def make_split(work: Workspace, processing: Processing, report: Report) -> Split:
    """Raises DataError if a split is left without events."""
    split = leave_one_out() if processing.split == "leave_one_out" else temporal(work, processing)
    counts = dict(work.run(f"SELECT {split.expression} AS split, count(*) FROM numbered GROUP BY split"))
    lacking = [name for name in SPLITS if not counts.get(name)]
    if lacking:
        by_user = processing.split == "leave_one_out"
        why = "no user has three events" if by_user else f"valid and test begin at {split.info['split_begins']}"
        fix = ("relax --min_rating, --duplicates or the minima of the k-core" if by_user else
               "other --split_ratios or --split_dates")
        raise DataError("interactions", f"no event is left for {' and '.join(lacking)}",
                        "; ".join([why, *report.lines()]), fix)
    return split._replace(info={**split.info, "num_in_split": {name: counts[name] for name in SPLITS}})


def leave_one_out() -> Split:
    """A user's last event is test and the one before it valid, where a training event remains."""
    return Split("""CASE WHEN length < 3 OR place < length - 2 THEN 'train'
                         WHEN place = length - 2 THEN 'valid' ELSE 'test' END""", {"split_name": "leave_one_out"})


def temporal(work: Workspace, processing: Processing) -> Split:
    """One moment for all users: what lies before it trains, so that no training event is later than a test event."""
    if processing.split_dates:
        begins = [work.value("SELECT epoch(?::TIMESTAMP)::BIGINT", date) for date in processing.split_dates]
    else:
        num_events = work.count("sorted")
        valid, test = processing.split_ratios[0], processing.split_ratios[0] + processing.split_ratios[1]
        begins = [_time_at(work, int(share * num_events)) for share in (valid, test)]
    expression = f"""CASE WHEN "timestamp" < {begins[0]} THEN 'train'
                          WHEN "timestamp" < {begins[1]} THEN 'valid' ELSE 'test' END"""
    return Split(expression, {"split_name": "temporal", "split_begins": {"valid": begins[0], "test": begins[1]}})


def _time_at(work: Workspace, rank: int) -> int:
    """The moment of the event that has `rank` events before it; events of one moment are never parted."""
    return work.value('SELECT "timestamp" FROM numbered ORDER BY "timestamp" LIMIT 1 OFFSET ?', rank)
