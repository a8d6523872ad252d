"""Split the events into train, valid and test, and compute the statistics of the dataset."""

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from common.artifacts import SPLITS, counts, facts
from common.errors import DataError
from dataloader.options import Processing, timestamp_of
from dataloader.tables.filters import Report, filter_lines
from dataloader.workspace import Workspace

TARGETS = ("valid", "test")
SHARES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Split(NamedTuple):
    """How the events are split: an SQL expression for the queries, and entries for the meta file."""

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
    # A cold item has a target, but no event in train. The set of the items of each split is a bitmap.
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
        raise DataError(raw, f"no events are left for the split {' and '.join(empty)}",
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


def measure(work: Workspace) -> dict:
    """Return statistics: counts, density, percentiles of the events per user and per item, first and last timestamp."""
    num_users, num_items, num_events = (work.count(table) for table in ("users", "items", "sorted"))
    [(first, last)] = work.run('SELECT min("timestamp"), max("timestamp") FROM numbered')
    # Exact duplicates have the same user, item and time. Search only the times at which a user has several events.
    work.run("""CREATE TABLE moments AS SELECT "user", "time", count(*) AS num_further FROM (
        SELECT "user", "time", lag("user") OVER () AS user_before, lag("time") OVER () AS time_before FROM sorted)
        WHERE "user" = user_before AND "time" = time_before GROUP BY ALL""")
    equal_times = work.value("SELECT coalesce(sum(num_further), 0)::BIGINT FROM moments")
    repeated = work.value("""SELECT coalesce(sum(n - 1), 0)::BIGINT FROM (
        SELECT count(*) AS n FROM sorted SEMI JOIN moments USING ("user", "time") GROUP BY "user", item, "time")""")
    quantiles, percentiles = ", ".join(f"quantile_disc(num_events, {share})" for share in SHARES.values()), {}
    for table, key in (("users", "events_of_a_user"), ("items", "events_of_an_item")):
        [(mean, *values)] = work.run(f"SELECT avg(num_events), {quantiles} FROM {table}")
        percentiles[key] = {"mean": round(mean, 2), **dict(zip(SHARES, values, strict=True))}
    return {
        "num_users": num_users, "num_items": num_items, "num_interactions": num_events,
        "density": num_events / (num_users * num_items), **percentiles,
        "first_timestamp": first, "last_timestamp": last, "num_exact_duplicates": repeated,
        "num_equal_times": equal_times,  # events with the same time as the previous event of their user
    }


def days_of(first: int, last: int) -> str:
    """Return a time range in seconds as dates (UTC), such as `2025-01-06 to 2025-08-19`."""
    return " to ".join(datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d") for seconds in (first, last))


def report_lines(meta: dict) -> list[str]:
    """Return a report on the filters and the statistics. `meta` is the meta file of the interactions."""
    statistics = meta["statistics"]
    days = days_of(statistics["first_timestamp"], statistics["last_timestamp"])
    parts = ", ".join(f"{name} {count:,}" for name, count in meta["num_in_split"].items())
    lines = [*filter_lines(meta["filters"]), f"{counts(meta)}; density {statistics['density']:.4%}",
             *(f"{key.replace('_', ' ')}: " + ", ".join(f"{k} {v:g}" for k, v in statistics[key].items())
               for key in ("events_of_a_user", "events_of_an_item")),
             f"{days}; {meta['split_name']}: {parts}", facts(meta)]
    if meta["num_records"]:
        lines.append(f"{meta['num_records']:,} item records: {meta['num_duplicate_records']:,} are duplicates, "
                     f"{meta['num_unused_records']:,} belong to items without interactions; "
                     f"{meta['num_without_record']:,} items have no record")
    if repeated := statistics["num_exact_duplicates"]:
        lines.append(f"{repeated:,} events are exact duplicates (same user, item and time)")
    return lines


