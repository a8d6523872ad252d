"""Filter events by rating, duplicates and k-core, and number the remaining users and items."""

from common.artifacts import filter_lines
from dataloader.options import Processing
from dataloader.workspace import Workspace


class Report:
    """The number of interactions that remain after each filter, in the order of the filters."""

    def __init__(self, work: Workspace):
        self.work = work
        self.steps = [{"step": "read", "interactions": work.count("kept")}]
        self.flags: list[str] = []  # flags of the filters that removed events

    def add(self, step: str, *flags: str) -> None:
        left = self.work.count("kept")
        if left < self.steps[-1]["interactions"]:
            self.flags += flags
        self.steps.append({"step": step, "interactions": left})

    def lines(self) -> list[str]:
        return filter_lines(self.steps)

    def how_to_keep_more(self) -> str:
        """Return the fix for an error about too few events. It names the flags of the filters that removed events."""
        return f"relax {' or '.join(self.flags)}" if self.flags else "use a file with more interactions"


def apply_filters(work: Workspace, processing: Processing, report: Report) -> None:
    """Apply the rating threshold, then remove duplicates, then compute the k-core."""
    if processing.min_rating is not None:
        work.run("DELETE FROM kept WHERE rating < ?::FLOAT", processing.min_rating)
        report.add(f"--min_rating {processing.min_rating:g}", "--min_rating")
    if processing.duplicates != "keep":
        # exact: keep the first line of equal events. user_item: for each user and item, keep the earliest event.
        key, first = {"exact": ('user_key, item_key, "time"', "min(line)"),
                      "user_item": ("user_key, item_key", 'arg_min(line, ("time", line))')}[processing.duplicates]
        work.run(f"DELETE FROM kept WHERE line NOT IN (SELECT {first} FROM kept GROUP BY {key})")
        report.add(f"--duplicates {processing.duplicates}", "--duplicates")
    k_core(work, processing.min_user_interactions, processing.min_item_interactions, report)


def drop_items_without_text(work: Workspace, report: Report) -> None:
    """Drop the events of items that have an empty text or no record."""
    work.run("""CREATE TABLE without_text AS
        SELECT key FROM item_keys WHERE raw NOT IN (SELECT raw_id FROM described WHERE "text" <> '')""")
    num_items = work.count("without_text")
    work.run("DELETE FROM kept WHERE item_key IN (FROM without_text)")
    report.add(f"--drop_items_without_text ({num_items:,} items)", "--drop_items_without_text")


def k_core(work: Workspace, min_user: int, min_item: int, report: Report) -> None:
    """Repeatedly remove users and items with too few events, until all remaining users and items have enough.

    A minimum of 0 or 1 has no effect.
    """
    minima = {"user": min_user, "item": min_item}
    for side in minima:
        work.run(f"""CREATE OR REPLACE TABLE {side}_counts AS
            SELECT {side}_key AS key, count(*) AS n FROM kept GROUP BY ALL""")
    sides = [pair for pair in (("user", "item"), ("item", "user")) if minima[pair[0]] > 1]
    dropped = True
    while dropped:
        dropped = False
        for side, other in sides:
            work.run(f"CREATE OR REPLACE TABLE short AS SELECT key FROM {side}_counts WHERE n < {minima[side]}")
            if work.count("short"):
                dropped = True
                work.run(f"""CREATE OR REPLACE TABLE lost AS
                    SELECT {other}_key AS key, count(*) AS n FROM kept WHERE {side}_key IN (FROM short) GROUP BY ALL""")
                work.run(f"DELETE FROM kept WHERE {side}_key IN (FROM short)")
                work.run(f"DELETE FROM {side}_counts WHERE n < {minima[side]}")
                work.run(f"""UPDATE {other}_counts SET n = {other}_counts.n - lost.n
                    FROM lost WHERE {other}_counts.key = lost.key""")
    if sides:
        flags = (f"--min_{side}_interactions" for side, _other in sides)
        report.add(f"the {min_user}/{min_item}-core (user/item)", *flags)


def number(work: Workspace, unit: int) -> None:
    """Number users and items from 0, and sort the events by user, then time, then line.

    unit: number of raw time units per second

    Creates the tables `users (id, raw_id, num_events)` and `items (id, raw_id, num_events)`, and the view
    `numbered ("user", item, "timestamp", rating, place, length)`. The ids follow the order in which users and items
    first occur in the remaining lines. `timestamp` is in whole seconds. `place` is the index of an event in the user's
    history, and `length` is the length of this history.
    """
    for side in ("user", "item"):
        # In `sorted`, the events of a user are adjacent, and the first of them has the row id `begins`. The `place` of
        # an event is its row id minus `begins`.
        work.run(f"""CREATE TABLE {side}_numbers AS
            SELECT key, (row_number() OVER in_order - 1)::INTEGER AS id, num_events::INTEGER AS num_events,
                   (sum(num_events) OVER in_order - num_events)::BIGINT AS begins
            FROM (SELECT {side}_key AS key, min(line) AS first, count(*) AS num_events FROM kept GROUP BY ALL)
            WINDOW in_order AS (ORDER BY first ROWS UNBOUNDED PRECEDING)""")
        work.run(f"""CREATE TABLE {side}s AS SELECT n.id, k.raw AS raw_id, n.num_events
            FROM {side}_numbers n JOIN {side}_keys k ON n.key = k.key ORDER BY n.id""")
    work.run("""CREATE TABLE sorted AS
        SELECT u.id AS "user", i.id AS item, k."time", k.rating, u.begins, u.num_events
        FROM kept k JOIN user_numbers u ON k.user_key = u.key JOIN item_numbers i ON k.item_key = i.key
        ORDER BY u.id, k."time", k.line""")
    work.run("DROP TABLE kept")
    work.run(f"""CREATE VIEW numbered AS
        SELECT "user", item, "time" // {unit} AS "timestamp", rating, rowid - begins AS place, num_events AS length
        FROM sorted""")
