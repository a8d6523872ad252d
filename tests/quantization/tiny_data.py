"""Write the artifacts of datasets that fit on a screen."""

import duckdb
import numpy as np
import pandas as pd

from common.artifacts import DatasetFolder, ids_sha256, load_meta, save_array
from common.publishing import publish


def save_items(folder: DatasetFolder, num_items: int, titles: list[str] | None = None) -> DatasetFolder:
    """Items with the raw IDs `raw 0`, `raw 1`, ..."""
    raw_ids = [f"raw {item}" for item in range(num_items)]
    titles = titles or [f"title {item}" for item in range(num_items)]
    frame = pd.DataFrame({"item": range(num_items), "raw_id": raw_ids, "title": titles, "text": titles})
    publish(folder.items, lambda path: _write(frame, path),
            {"inputs": {}, "num_items": num_items, "items_sha256": ids_sha256(raw_ids)})
    return folder


def save_users(folder: DatasetFolder, raw_ids: list[str]) -> None:
    frame = pd.DataFrame({"user": range(len(raw_ids)), "raw_id": raw_ids})
    publish(folder.users, lambda path: _write(frame, path), {"inputs": {}})


def save_interactions(folder: DatasetFolder, events: list[tuple[int, int, str]], **meta) -> None:
    """`(user, item, split)` in their order, a second apart."""
    frame = pd.DataFrame(events, columns=["user", "item", "split"])
    frame["timestamp"], frame["rating"] = range(len(frame)), 5.0
    items = {"items_sha256": load_meta(folder.items, "")["items_sha256"]} if folder.items.exists() else {}
    publish(folder.interactions, lambda path: _write(frame, path), {"inputs": {}, **items, **meta})


def save_embedding(folder: DatasetFolder, suffix: str, rows: np.ndarray) -> None:
    items = load_meta(folder.items, "")
    save_array(folder.embeddings(suffix), rows.astype(np.float32),
               {"inputs": {folder.items.name: items["sha256"]}, "items_sha256": items["items_sha256"]})


def save_codes(folder: DatasetFolder, codes: np.ndarray, sizes: list[int], quantizer: str = "q") -> None:
    items = load_meta(folder.items, "")
    save_array(folder.codes(quantizer, "td", None), codes.astype(np.int32), {
        "inputs": {folder.items.name: items["sha256"]}, "items_sha256": items["items_sha256"],
        "codebook_sizes": sizes, "disambiguation_level": None, "collision_rate_before": 0.0,
        "collision_rate_after": 0.0})


def _write(frame: pd.DataFrame, path) -> None:
    duckdb.from_df(frame).write_parquet(str(path))
