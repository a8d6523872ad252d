"""Which events train a model and which judge it; and what the data set then looks like in numbers."""

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from common.artifacts import SPLITS
from common.errors import DataError
from dataloader.options import Processing, timestamp_of
from dataloader.tables.filters import Report, filter_lines
from dataloader.workspace import Workspace

SHARES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Split(NamedTuple):
    """SQL for an event's split, over the columns of `numbered`; and what the next stage may want to know of it."""

    expression: str
    info: dict


def make_split(work: Workspace, processing: Processing, report: Report, raw: Path) -> Split:
    """Leave-one-out: a user's last event is test and the one before it valid, where a training event remains.

    Temporal: one moment for all users, so that no training event is later than a test event. Raises DataError, which
    names the `raw` interactions, if a split is left without events.
    """
    info = {"split_name": processing.split}
    if processing.split == "leave_one_out":
        expression = """CASE WHEN length < 3 OR place < length - 2 THEN 'train'
                             WHEN place = length - 2 THEN 'valid' ELSE 'test' END"""
        why, fix = "no user has three events", report.how_to_keep_more()
    else:
        begins = list(map(timestamp_of, processing.split_dates))
        if not begins:
            num_events, (train, valid, _test) = work.count("sorted"), processing.split_ratios
            # How many events lie before a share's end: 8 of 10 for 0.7 + 0.1, which is 0.7999… to a computer. Events of
            # one moment are never parted.
            ranks = [min(int(round(share * num_events, 6)), num_events - 1) for share in (train, train + valid)]
            begins = [work.value('SELECT "timestamp" FROM numbered ORDER BY "timestamp" LIMIT 1 OFFSET ?', rank)
                      for rank in ranks]
        expression = f"""CASE WHEN "timestamp" < {begins[0]} THEN 'train'
                              WHEN "timestamp" < {begins[1]} THEN 'valid' ELSE 'test' END"""
        info["split_begins"] = {"valid": begins[0], "test": begins[1]}
        why = f"by time, valid at {begins[0]} and test at {begins[1]} (seconds)"
        fix = "other --split_ratios or --split_dates"
    counts = dict(work.run(f"SELECT {expression} AS split, count(*) FROM numbered GROUP BY split"))
    if lacking := [name for name in SPLITS if not counts.get(name)]:
        raise DataError(raw, f"no event is left for {' and '.join(lacking)}", "; ".join([why, *report.lines()]), fix)
    return Split(expression, {**info, "num_in_split": {name: counts[name] for name in SPLITS}})


def measure(work: Workspace) -> dict:
    """Counts, density, the percentiles of events a user and an item has, and the time between first and last."""
    num_users, num_items, num_events = (work.count(table) for table in ("users", "items", "sorted"))
    [(first, last)] = work.run('SELECT min("timestamp"), max("timestamp") FROM numbered')
    # Events that repeat another of the same user, item and time: looked for where a user has several at once.
    work.run("""CREATE TABLE moments AS SELECT DISTINCT "user", "time" FROM (
        SELECT "user", "time", lag("user") OVER () AS user_before, lag("time") OVER () AS time_before FROM sorted)
        WHERE "user" = user_before AND "time" = time_before""")
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
    }


def counts(meta: dict) -> str:
    return f"{meta['num_users']:,} users, {meta['num_items']:,} items, {meta['num_interactions']:,} interactions"


def report_lines(meta: dict) -> list[str]:
    """What the filters removed and what is left, for a reader, from the meta of the interactions."""
    statistics = meta["statistics"]
    days = " to ".join(datetime.fromtimestamp(statistics[f"{end}_timestamp"], UTC).strftime("%Y-%m-%d")
                       for end in ("first", "last"))
    parts = ", ".join(f"{name} {count:,}" for name, count in meta["num_in_split"].items())
    lines = [*filter_lines(meta["filters"]), f"{counts(meta)}; density {statistics['density']:.4%}",
             *(f"{of_whom.replace('_', ' ')}: " + ", ".join(f"{k} {v:g}" for k, v in statistics[of_whom].items())
               for of_whom in ("events_of_a_user", "events_of_an_item")),
             f"{days}; {meta['split_name']}: {parts}"]
    if meta["num_records"]:
        lines.append(f"{meta['num_records']:,} item records: {meta['num_duplicate_records']:,} repeat another, "
                     f"{meta['num_unused_records']:,} are of items without interactions; "
                     f"{meta['num_without_record']:,} items have no record")
    if repeated := statistics["num_exact_duplicates"]:
        lines.append(f"{repeated:,} events repeat another of the same user, item and time")
    return lines


