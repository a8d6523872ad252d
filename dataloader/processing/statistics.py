"""What a data set looks like in numbers: kept in the meta of its interactions, and printed."""

from datetime import UTC, datetime

from dataloader.processing.workspace import Workspace

SHARES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


def measure(work: Workspace) -> dict:
    """Counts, density, the percentiles of events a user and an item has, and the time between first and last."""
    num_users, num_items, num_events = (work.count(table) for table in ("users", "items", "sorted"))
    [(first, last)] = work.run('SELECT min("timestamp"), max("timestamp") FROM numbered')
    return {
        "num_users": num_users, "num_items": num_items, "num_interactions": num_events,
        "density": num_events / (num_users * num_items),
        "events_of_a_user": _percentiles(work, "users"), "events_of_an_item": _percentiles(work, "items"),
        "first_timestamp": first, "last_timestamp": last, "num_exact_duplicates": _repeated(work),
    }


def _repeated(work: Workspace) -> int:
    """How many events repeat another of the same user, item and time: looked for where a user has several at once."""
    work.run("""CREATE TABLE moments AS SELECT DISTINCT "user", "time" FROM (
        SELECT "user", "time", lag("user") OVER () AS user_before, lag("time") OVER () AS time_before FROM sorted)
        WHERE "user" = user_before AND "time" = time_before""")
    return work.value("""SELECT coalesce(sum(n - 1), 0)::BIGINT FROM (
        SELECT count(*) AS n FROM sorted SEMI JOIN moments USING ("user", "time") GROUP BY "user", item, "time")""")


def _percentiles(work: Workspace, table: str) -> dict[str, float]:
    quantiles = ", ".join(f"quantile_disc(num_events, {share})" for share in SHARES.values())
    [(mean, *values)] = work.run(f"SELECT avg(num_events), {quantiles} FROM {table}")
    return {"mean": round(mean, 2), **dict(zip(SHARES, values, strict=True))}


def counts(meta: dict) -> str:
    return f"{meta['num_users']:,} users, {meta['num_items']:,} items, {meta['num_interactions']:,} interactions"


def report_lines(meta: dict) -> list[str]:
    """What the filters removed and what is left, for a reader, from the meta of the interactions."""
    statistics = meta["statistics"]
    lines = filter_lines(meta["filters"])
    lines.append(f"{counts(meta)}; density {statistics['density']:.4%}")
    for of_whom in ("events_of_a_user", "events_of_an_item"):
        lines.append(f"{of_whom.replace('_', ' ')}: " + ", ".join(f"{k} {v:g}" for k, v in statistics[of_whom].items()))
    days = " to ".join(_day(statistics[f"{end}_timestamp"]) for end in ("first", "last"))
    parts = ", ".join(f"{name} {count:,}" for name, count in meta["num_in_split"].items())
    lines.append(f"{days}; {meta['split_name']}: {parts}")
    if meta["num_records"]:
        lines.append(f"{meta['num_records']:,} item records: {meta['num_duplicate_records']:,} repeat another, "
                     f"{meta['num_unused_records']:,} are of items without interactions; "
                     f"{meta['num_without_record']:,} items have no record")
    if repeated := statistics["num_exact_duplicates"]:
        lines.append(f"{repeated:,} events repeat another of the same user, item and time")
    return lines


def filter_lines(steps: list[dict]) -> list[str]:
    """A line for each filter: what it removed and what it left."""
    lines, before = [], None
    for step in steps:
        left = step["interactions"]
        lines.append(f"{left:,} interactions {step['step']}" if before is None else
                     f"{before - left:,} removed by {step['step']}, {left:,} left")
        before = left
    return lines


def _day(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")
