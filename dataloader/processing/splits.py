"""Which events train a model and which judge it."""

from pathlib import Path
from typing import NamedTuple

from common.artifacts import SPLITS
from common.errors import DataError
from dataloader.options import Processing
from dataloader.processing.filters import Report
from dataloader.processing.workspace import Workspace
from dataloader.values import moment


class Split(NamedTuple):
    """SQL for an event's split, over the columns of `numbered`; and what the next stage may want to know of it."""

    expression: str
    info: dict


def make_split(work: Workspace, processing: Processing, report: Report, raw: Path) -> Split:
    """Raises DataError, which names the `raw` interactions, if a split is left without events."""
    split = leave_one_out() if processing.split == "leave_one_out" else temporal(work, processing)
    counts = dict(work.run(f"SELECT {split.expression} AS split, count(*) FROM numbered GROUP BY split"))
    lacking = [name for name in SPLITS if not counts.get(name)]
    if lacking and processing.split == "leave_one_out":
        raise DataError(raw, f"no event is left for {' and '.join(lacking)}", "; ".join(
            ["no user has three events", *report.lines()]), report.how_to_keep_more())
    if lacking:
        begins = " and ".join(f"{name} at {begin}" for name, begin in split.info["split_begins"].items())
        raise DataError(raw, f"no event is left for {' and '.join(lacking)}", "; ".join(
            [f"by time, {begins} (seconds)", *report.lines()]), "other --split_ratios or --split_dates")
    return split._replace(info={**split.info, "num_in_split": {name: counts[name] for name in SPLITS}})


def leave_one_out() -> Split:
    """A user's last event is test and the one before it valid, where a training event remains."""
    return Split("""CASE WHEN length < 3 OR place < length - 2 THEN 'train'
                         WHEN place = length - 2 THEN 'valid' ELSE 'test' END""", {"split_name": "leave_one_out"})


def temporal(work: Workspace, processing: Processing) -> Split:
    """One moment for all users: what lies before it trains, so that no training event is later than a test event."""
    if processing.split_dates:
        begins = list(map(moment, processing.split_dates))
    else:
        num_events = work.count("sorted")
        train, valid, _test = processing.split_ratios
        begins = [_time_at(work, _rank(share, num_events)) for share in (train, train + valid)]
    expression = f"""CASE WHEN "timestamp" < {begins[0]} THEN 'train'
                          WHEN "timestamp" < {begins[1]} THEN 'valid' ELSE 'test' END"""
    return Split(expression, {"split_name": "temporal", "split_begins": {"valid": begins[0], "test": begins[1]}})


def _rank(share: float, num_events: int) -> int:
    """How many events lie before the share's end: 8 of 10 for a share of 0.7 + 0.1, which is 0.7999… to a computer."""
    return min(int(round(share * num_events, 6)), num_events - 1)


def _time_at(work: Workspace, rank: int) -> int:
    """The moment of the event that has `rank` events before it; events of one moment are never parted."""
    return work.value('SELECT "timestamp" FROM numbered ORDER BY "timestamp" LIMIT 1 OFFSET ?', rank)
