"""figures.parquet, which says of every item whether it has an image, and where: written by step 1, read by step 4."""

import logging
from typing import NamedTuple

import duckdb
import numpy as np

from common.artifacts import DatasetFolder, load_meta
from common.errors import DataError
from common.publishing import publish
from common.tables import parquet_rows

log = logging.getLogger(__name__)

NUM_LISTED = 10


class Figure(NamedTuple):
    """An address and what lies in `images/` for it; `ok` and `placeholder` have a file, the others have none."""

    url: str
    status: str  # ok, placeholder, or why there is none: bad address, unreachable, too large, not an image
    detail: str = ""
    file: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""


class Figures(NamedTuple):
    """The table as arrays with one entry an item, in item order; file and sha256 are None where there is no file."""

    raw_id: np.ndarray   # object
    file: np.ndarray     # object, relative to `images/`
    sha256: np.ndarray   # object, of the file's bytes
    present: np.ndarray  # bool: whether the item has an image, and no mere placeholder


def make_command(folder: DatasetFolder) -> str:
    return f"bash dataloader/1_load_figure.sh --dataset {folder.name}{folder.root_flag}"


def publish_figures(folder: DatasetFolder, figures: list[Figure], meta: dict) -> None:
    """Write the table: item, raw_id, url, file, status, detail, width, height, sha256, one row an item."""
    import pandas as pd  # takes a second, which a wrong flag shall not

    with duckdb.connect() as connection:
        connection.register("figures", pd.DataFrame(figures, columns=Figure._fields))
        table = connection.sql(f"""
            SELECT item, raw_id, image_url AS url, nullif(file, '') AS file,
                   coalesce(status, 'no address') AS status, nullif(detail, '') AS detail,
                   nullif(width, 0)::INTEGER AS width, nullif(height, 0)::INTEGER AS height,
                   nullif(sha256, '') AS sha256
            FROM {parquet_rows(folder.items)} LEFT JOIN figures ON image_url = url ORDER BY item""")
        counts = dict(table.aggregate("status, count(*)", "status").order("2 DESC, 1").fetchall())
        publish(folder.figures, lambda staged: table.write_parquet(str(staged)), {**meta, "counts": counts})
    log.info("figures: wrote %s (%s)", folder.figures, counts_text(counts))


def load_figures(folder: DatasetFolder) -> Figures:
    load_meta(folder.figures, make_command(folder))
    rows = duckdb.sql(f"""SELECT raw_id, file, sha256, status = 'ok'
                          FROM {parquet_rows(folder.figures)} ORDER BY item""").fetchall()
    raw_id, file, sha256, present = (np.array([row[i] for row in rows], dtype=object) for i in range(4))
    return Figures(raw_id, file, sha256, present.astype(bool))


def recorded_files(folder: DatasetFolder) -> dict[str, tuple[int, int, str]]:
    """file -> width, height, sha256, as the last run wrote them down, even if the items have changed since."""
    try:
        rows = duckdb.sql(f"""SELECT file, width, height, sha256 FROM {parquet_rows(folder.figures)}
                              WHERE file IS NOT NULL""").fetchall()
    except duckdb.Error:  # not there, or not readable: the files speak for themselves
        return {}
    return {file: tuple(rest) for file, *rest in rows}


def counts_text(counts: dict[str, int]) -> str:
    return f"{sum(counts.values())} items: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def report_missing(folder: DatasetFolder) -> None:
    """Name the first items without an image."""
    num_missing, rows = _missing(folder)
    for raw_id, status, detail in rows:
        log.info("figures:   %s: %s%s", raw_id, status, f" ({detail})" if detail else "")
    if num_missing:
        log.warning("figures: %d items have no image; %s lists them all", num_missing, folder.figures.name)


def refuse_missing(folder: DatasetFolder) -> None:
    """Raise DataError naming the first items without an image, if there are any."""
    num_missing, rows = _missing(folder)
    if num_missing:
        raise DataError(folder.figures, f"{num_missing} items have no image",
                        ", ".join(f"{raw_id} ({status})" for raw_id, status, _ in rows),
                        f"{make_command(folder)} again, or go on without them: --missing_images mask")


def _missing(folder: DatasetFolder) -> tuple[int, list[tuple]]:
    """How many items have no image, and the raw id, status and detail of the first ones."""
    counts = load_meta(folder.figures, make_command(folder))["counts"]
    rows = duckdb.sql(f"""SELECT raw_id, status, detail FROM {parquet_rows(folder.figures)}
                          WHERE status <> 'ok' ORDER BY item LIMIT {NUM_LISTED}""").fetchall()
    return sum(counts.values()) - counts.get("ok", 0), rows
