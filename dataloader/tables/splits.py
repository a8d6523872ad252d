"""Split the events into train, valid and test."""

from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.table_files import SPLITS
from dataloader.options import Processing, timestamp_of
from dataloader.tables.filters import Report
from dataloader.workspace import Workspace

TARGETS = ("valid", "test")


class Split(NamedTuple):
    """A split of the events: an SQL expression for the queries, and entries for the meta file."""

    expression: str  # for a row of `numbered`, its value is train, valid or test
    info: dict       # entries about the split for the meta file


def make_split(work: Workspace, processing: Processing, report: Report, raw: Path) -> Split:
    """Return the split that the options select.

    Leave-one-out: if a user has at least three events, the last event is in test and the second to last is in valid.
    All other events are in train. Temporal: valid and test begin at the same times for all users.

    Raises DataError if a split has no events. The error names the file `raw`.
    """
    info = {"split_name": processing.split}
    if processing.split == "leave_one_out":
        expression = """CASE WHEN length < 3 OR place < length - 2 THEN 'train'
                             WHEN place = length - 2 THEN 'valid' ELSE 'test' END"""
        why, fix = "No user has three events", report.how_to_keep_more()
    else:
        begins = list(map(timestamp_of, processing.split_dates))
        if not begins:
            num_events, (train, valid, _test) = work.count("sorted"), processing.split_ratios
            # `ranks` are the numbers of events before valid and before test. In floating point, 0.7 + 0.1 is 0.7999…;
            # rounding makes this 8 of 10 events. Events with the same timestamp are in the same split.
            ranks = [min(int(round(share * num_events, 6)), num_events - 1) for share in (train, train + valid)]
            begins = [work.value('SELECT "timestamp" FROM numbered ORDER BY "timestamp" LIMIT 1 OFFSET ?', rank)
                      for rank in ranks]
        expression = f"""CASE WHEN "timestamp" < {begins[0]} THEN 'train'
                              WHEN "timestamp" < {begins[1]} THEN 'valid' ELSE 'test' END"""
        info["split_begins"] = {"valid": begins[0], "test": begins[1]}
        why = f"The split valid begins at {begins[0]} and test at {begins[1]} (timestamps in seconds)"
        fix = "use other --split_ratios or --split_dates"
    # A cold item is the item of a target, but has no event in train. A bitmap contains the items of each split.
    found = {name: (num_events, num_cold) for name, num_events, num_cold in work.run(f"""
        WITH splits AS MATERIALIZED (
            SELECT {expression} AS split, count(*) AS num_events,
                   bitstring_agg(item, 0, {work.count("items") - 1}) AS items FROM numbered GROUP BY split)
        SELECT s.split, s.num_events, bit_count(s.items & ~train.items)
        FROM splits s LEFT JOIN splits train ON train.split = 'train'""")}
    if empty := [name for name in SPLITS if name not in found]:
        num_times = work.value('SELECT count(DISTINCT "timestamp") FROM numbered')
        if processing.split == "temporal" and num_times < len(SPLITS):  # no ratios or dates can work
            why += f"; the number of different timestamps is {num_times}, but a temporal split needs {len(SPLITS)}"
            fix = "use --split leave_one_out, which needs at least one user with three events"
        raise DataError(raw, f"no events are left for {' and '.join(empty)}",
                        "; ".join([why, *report.lines()]), fix)
    # A repeat is a target whose item is in the history of its user.
    repeats = dict(work.run(f"""
        SELECT split, count(*) FROM (SELECT *, {expression} AS split FROM numbered) target
        WHERE split <> 'train' AND EXISTS (SELECT 1 FROM numbered before WHERE before."user" = target."user"
                                           AND before.item = target.item AND before.place < target.place)
        GROUP BY split"""))
    return Split(expression, {**info, "num_in_split": {name: found[name][0] for name in SPLITS},
                              "num_repeats": {name: repeats.get(name, 0) for name in TARGETS},
                              "num_cold_items": {name: found[name][1] for name in TARGETS}})
