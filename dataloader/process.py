"""Step 2: raw files become interactions.parquet, items.parquet and users.parquet."""

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType

import duckdb
import pandas as pd

from common.artifacts import file_sha256, ids_sha256, load_meta, publish
from common.cli import command_line
from common.errors import DataError, UserError, run_command
from common.run import FolderLock, log_to_console
from dataloader.options import DataOptions, parse_options
from dataloader.sources.text import shorten

log = logging.getLogger(__name__)

MAX_TEXT = 10_000  # characters; far more than any text model reads


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Turn raw files into interactions, items and users.")
    log_to_console()
    process(options, command_line("bash dataloader/2_process.sh", argv))


def process(options: DataOptions, command: str) -> None:
    """Filter, number, order and split the events, and publish the three tables."""
    folder, reader = options.folder, _reader(options)
    if not options.force and is_current(options):
        meta = load_meta(folder.interactions, command)
        log.info("process: reusing %s (%s)", folder.interactions, _counts(meta))
        return
    paths = reader.raw_paths(options.raw, folder.name)
    with FolderLock(folder.path), duckdb.connect() as connection:
        records = reader.read(paths, connection)
        removed = k_core(connection, options.min_user_interactions, options.min_item_interactions)
        if _count(connection, "events") == 0:
            raise DataError(paths[0], "no interaction is left", ", ".join(removed),
                            "relax --min_user_interactions or --min_item_interactions")
        for line in removed:
            log.info("process: %s", line)
        number_and_split(connection)
        items = describe_items(connection, records, options.config["text"])
        meta = {"command": command, "settings": _settings(options),
                "raw": {path.name: file_sha256(path) for path in paths}, "split_name": "leave_one_out"}
        _publish_tables(options, connection, items, meta)
    _report(options)


def _settings(options: DataOptions) -> dict:
    return {"source": options.source, "text": options.config["text"],
            "min_user_interactions": options.min_user_interactions,
            "min_item_interactions": options.min_item_interactions}


def _reader(options: DataOptions) -> ModuleType:
    return importlib.import_module(f"dataloader.sources.{options.config['reader']}")


def is_current(options: DataOptions) -> bool:
    """Whether the tables there were made with these settings from these raw files (which may be deleted since)."""
    try:
        meta = load_meta(options.folder.interactions, "")
    except UserError:
        return False
    if meta["settings"] != _settings(options):
        return False
    try:
        paths = _reader(options).raw_paths(options.raw, options.folder.name)
    except DataError:
        return True
    return meta["raw"] == {path.name: file_sha256(path) for path in paths}


def k_core(connection: duckdb.DuckDBPyConnection, min_user: int, min_item: int) -> list[str]:
    """Drop users and items with too few events until none is left; a line of text a round."""
    left = _count(connection, "events")
    report, before = [f"{left} interactions read"], -1
    while before != left:
        before = left
        for column, minimum in (("raw_user", min_user), ("raw_item", min_item)):
            if minimum > 1:
                connection.execute(f"""DELETE FROM events WHERE {column} IN (
                    SELECT {column} FROM events GROUP BY {column} HAVING count(*) < {int(minimum)})""")
        left = _count(connection, "events")
        if left != before:
            report.append(f"{left} left by the {min_user}/{min_item}-core")
    return report


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    [(count,)] = connection.execute(f"SELECT count(*) FROM {table}").fetchall()
    return count


def number_and_split(connection: duckdb.DuckDBPyConnection) -> None:
    """Make `numbered`: integer ids by first appearance, order by (time, line), leave-one-out split.

    A user's last event is test and the one before it valid, where a training event remains.
    """
    for side in ("user", "item"):
        connection.execute(f"""
            CREATE TABLE {side}_ids AS
            SELECT raw_{side} AS raw_id, (row_number() OVER (ORDER BY min(line)) - 1)::INTEGER AS id
            FROM events GROUP BY raw_{side}""")
    connection.execute("""
        CREATE TABLE numbered AS
        SELECT u.id AS "user", i.id AS item, e."timestamp", e.rating::FLOAT AS rating, e.line,
               row_number() OVER last_first AS from_end,
               count(*) OVER (PARTITION BY u.id) AS length
        FROM events e JOIN user_ids u ON e.raw_user = u.raw_id JOIN item_ids i ON e.raw_item = i.raw_id
        WINDOW last_first AS (PARTITION BY u.id ORDER BY e."timestamp" DESC, e.line DESC)""")


def describe_items(connection: duckdb.DuckDBPyConnection, records, fields: list[str]) -> pd.DataFrame:
    """`item, raw_id, title, text` of the kept items; an item without text gets its raw id as text."""
    ids = dict(connection.execute("SELECT raw_id, id FROM item_ids").fetchall())
    title, text, num_cut = [""] * len(ids), [""] * len(ids), 0
    for record in records:
        index = ids.get(record["raw_id"])
        if index is None or text[index]:  # the first record of an item counts
            continue
        whole = ". ".join(record[field] for field in fields if record.get(field))
        title[index], text[index] = record["title"], shorten(whole, MAX_TEXT)
        num_cut += len(whole) > MAX_TEXT
    table = pd.DataFrame({"raw_id": ids.keys(), "item": ids.values()}).sort_values("item", ignore_index=True)
    bare = [not t for t in text]
    table["title"] = [t or raw_id for t, raw_id in zip(title, table["raw_id"], strict=True)]
    table["text"] = [t or raw_id for t, raw_id in zip(text, table["raw_id"], strict=True)]
    table.attrs |= {"num_without_text": sum(bare), "num_texts_cut": num_cut}
    return table[["item", "raw_id", "title", "text"]]


def _publish_tables(options: DataOptions, connection, items: pd.DataFrame, meta: dict) -> None:
    """users and items first, then the interactions, which record the hashes of both."""
    folder = options.folder
    item_info = {"num_items": len(items), "items_sha256": ids_sha256(list(items["raw_id"])), **items.attrs}
    connection.register("items_frame", items)
    num_users = _count(connection, "user_ids")
    made = {
        folder.items: _publish(connection, "SELECT * FROM items_frame ORDER BY item", folder.items,
                               {"inputs": {}, **meta, **item_info}),
        folder.users: _publish(connection, 'SELECT id AS "user", raw_id FROM user_ids ORDER BY id', folder.users,
                               {"inputs": {}, **meta, "num_users": num_users}),
    }
    _publish(connection, """
        SELECT "user", item, "timestamp", rating,
               CASE WHEN length < 3 OR from_end > 2 THEN 'train' WHEN from_end = 2 THEN 'valid' ELSE 'test' END AS split
        FROM numbered ORDER BY "user", "timestamp", line""", folder.interactions,
             {"inputs": {path.name: m["sha256"] for path, m in made.items()}, **meta, **item_info,
              "num_users": num_users, "num_interactions": _count(connection, "events")})


def _publish(connection, query: str, path: Path, meta: dict) -> dict:
    def write(staged: Path) -> None:
        connection.sql(query).write_parquet(str(staged))

    return publish(path, write, meta)


def _counts(meta: dict) -> str:
    return f"{meta['num_users']:,} users, {meta['num_items']:,} items, {meta['num_interactions']:,} interactions"


def _report(options: DataOptions) -> None:
    meta = load_meta(options.folder.interactions, "")
    log.info("process: %s: %s", options.folder.name, _counts(meta))
    if meta["num_without_text"]:
        log.warning("process: %d items have no text; their raw ids stand in for it", meta["num_without_text"])
    expected = options.config["expected"].get(options.folder.name)
    found = [meta["num_users"], meta["num_items"], meta["num_interactions"]]
    if expected and (options.min_user_interactions, options.min_item_interactions) == (5, 5):
        if expected == found:
            log.info("process: these are the counts that the literature has")
        else:
            log.warning("process: the literature has %s users, items, interactions, and this set %s", expected, found)


if __name__ == "__main__":
    sys.exit(run_command(main))
