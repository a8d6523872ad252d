"""Statistics of the tables, for their meta files and for the report that `process` prints."""

import logging
from datetime import UTC, datetime

from common.artifacts import counts, facts, filter_lines
from dataloader.options import ProcessOptions
from dataloader.tables.events import EventCounts
from dataloader.tables.filters import Report
from dataloader.tables.items import MAX_TEXT
from dataloader.tables.splits import Split
from dataloader.workspace import Workspace

SHARES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


def summarize(work: Workspace, report: Report, events: EventCounts, records: dict, split: Split) -> dict:
    """Return the entries of the meta files that describe the content of the tables.

    records: the counts that `describe_items` returns
    """
    [(without_text, cut, without_record)] = work.run("""
        SELECT count(*) FILTER (coalesce(d."text", '') = ''), count(*) FILTER (d.cut),
               count(*) FILTER (d.raw_id IS NULL)
        FROM items i LEFT JOIN described d ON i.raw_id = d.raw_id""")
    statistics = _measure(work)
    num_distinct = records["num_records"] - records["num_duplicate_records"]
    return {"filters": report.steps, **records, "num_bad_lines": events.num_bad + records["num_bad_lines"],
            "num_events_before_1990": events.num_before_1990,
            "num_without_text": without_text, "num_texts_cut": cut, "num_without_record": without_record,
            "num_unused_records": num_distinct - (statistics["num_items"] - without_record), "statistics": statistics,
            **{key: statistics[key] for key in ("num_users", "num_items", "num_interactions")},
            **split.info}


def _measure(work: Workspace) -> dict:
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




def notes(options: ProcessOptions, meta: dict) -> list[tuple[int, str]]:
    """Return further lines of the report with their log levels. They also compare the counts with the literature."""
    lines, without_text, cut = [], meta["num_without_text"], meta["num_texts_cut"]
    if without_text:
        lines.append((logging.WARNING, f"{without_text} items have no text; their raw ids are used as text"))
    if cut:
        lines.append((logging.INFO, f"{cut} texts are longer than {MAX_TEXT} characters and were cut"))
    expected = options.config["expected"].get(options.folder.name)
    found = [meta["num_users"], meta["num_items"], meta["num_interactions"]]
    # The counts in the literature are after 5-core filtering, without any other filter.
    five_core = options.processing._replace(min_user_interactions=5, min_item_interactions=5, min_rating=None,
                                            duplicates="keep", drop_items_without_text=False)
    if expected and options.processing == five_core:
        lines.append((logging.INFO, "the counts are equal to those in the literature") if expected == found else
                     (logging.WARNING, f"the literature has {expected} users, items and interactions, but this dataset "
                                       f"has {found}"))
    return lines
