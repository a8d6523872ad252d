"""The folder of a small dataset, as the processing step writes it."""

from pathlib import Path

import duckdb
import pandas as pd

from common.artifacts import ids_sha256
from common.publishing import publish
from dataloader.options import Options
from tests.dataloader.helpers import make_options


def write_dataset(data_root: Path, texts: list[str], *flags: str, image_urls: list[str | None] | None = None,
                  events: list[tuple[int, int, int, str]] = ()) -> Options:
    """Items with raw ids `raw-0`, `raw-1`, … and these texts; events as (user, item, time, split), in order.

    Returns the options with these flags for this dataset, `Baby`.
    """
    options = make_options(data_root, *flags)
    folder = options.folder
    raw_ids = [f"raw-{n}" for n in range(len(texts))]
    users = sorted({user for user, *_ in events})
    info = {"command": "bash dataloader/2_process.sh", "num_items": len(texts), "items_sha256": ids_sha256(raw_ids),
            "num_users": len(users), "num_interactions": len(events), "split_name": "leave_one_out"}
    items = pd.DataFrame({"item": range(len(texts)), "raw_id": raw_ids, "title": [f"title {r}" for r in raw_ids],
                          "text": texts, "image_url": pd.Series(image_urls or [None] * len(texts), dtype=object)})
    made = [_write(folder.items, "item::INTEGER AS item, raw_id::VARCHAR AS raw_id, title::VARCHAR AS title, "
                   "text::VARCHAR AS text, image_url::VARCHAR AS image_url", items, {**info, "inputs": {}}),
            _write(folder.users, '"user"::INTEGER AS "user", raw_id', pd.DataFrame(
                {"user": users, "raw_id": [f"user-{u}" for u in users]}), {**info, "inputs": {}})]
    columns = ["user", "item", "timestamp", "split"]
    table = pd.DataFrame({name: [e[i] for e in events] for i, name in enumerate(columns)})
    _write(folder.interactions, '"user"::INTEGER AS "user", item::INTEGER AS item, "timestamp"::BIGINT AS "timestamp", '
           "5::FLOAT AS rating, split::VARCHAR AS split", table,
           {**info, "inputs": {path.name: meta["sha256"] for path, meta in
                               zip((folder.items, folder.users), made, strict=True)}})
    return options


def add_item(options, text: str) -> None:
    """Write the same items again with one more at the end."""
    rows = duckdb.read_parquet(str(options.folder.items)).order("item").fetchall()
    write_dataset(options.folder.data_root, [row[3] for row in rows] + [text])


def _write(path: Path, columns: str, frame: pd.DataFrame, meta: dict) -> dict:
    def write(staged: Path) -> None:
        duckdb.from_df(frame).project(columns).write_parquet(str(staged))

    return publish(path, write, meta)


