"""MovieLens 100k, as GroupLens packs it or out of the recbole package."""

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd

from common.errors import DataError

GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
YEAR = re.compile(r"\s*\((\d{4})\)(?:\s*\(V\))?\s*$")
ARTICLE = re.compile(r"^(.*), (The|A|An)(?=$| \()")


def raw_paths(raw: Path, dataset: str) -> list[Path]:
    """The one archive that holds the data set."""
    candidates = [raw / f"{dataset}.zip", *sorted(raw.glob("recbole-*.whl"))]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise DataError(raw, "has no archive", f"looked for {dataset}.zip and recbole-*.whl",
                        f"bash dataloader/0_download_dataset.sh --dataset {dataset} --force")
    return [found]


def read(paths: list[Path], connection: duckdb.DuckDBPyConnection) -> Iterator[dict]:
    """Fill the table `events` and return the items' records, each with `raw_id`, title, year and genres."""
    [path] = paths
    try:
        with zipfile.ZipFile(path) as archive:
            if path.suffix == ".whl":
                folder = "recbole/dataset_example/ml-100k/ml-100k"
                events, items = archive.read(f"{folder}.inter"), archive.read(f"{folder}.item")
                records = _recbole_items(items.decode("utf-8"))
                events = events.split(b"\n", 1)[1]
            else:
                events, items = archive.read("ml-100k/u.data"), archive.read("ml-100k/u.item")
                records = _grouplens_items(items.decode("latin-1"))
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, IndexError) as error:
        raise DataError(path, "is not the expected archive", str(error), "fetch it again (--force)") from error
    # Everything is text at first: ids stay as they are written.
    frame = pd.read_csv(io.BytesIO(events), sep="\t", header=None, dtype=str, keep_default_na=False,
                        quoting=csv.QUOTE_NONE, names=["raw_user", "raw_item", "rating", "timestamp"])
    if lacking := list(frame.index[frame.isna().any(axis=1)][:1]):
        raise DataError(path, f"event {lacking[0] + 1} lacks a field", "wanted user, item, rating, time",
                        "fetch it again (--force)")
    frame["line"] = range(1, len(frame) + 1)
    connection.register("frame", frame)
    try:
        connection.execute("""
            CREATE TABLE events AS SELECT raw_user::VARCHAR AS raw_user, raw_item::VARCHAR AS raw_item,
                "timestamp"::VARCHAR::BIGINT AS "timestamp", rating::VARCHAR::DOUBLE AS rating, line FROM frame""")
    except duckdb.ConversionException as error:
        raise DataError(path, "holds a rating or time that is no number", str(error).splitlines()[0],
                        "fetch it again (--force)") from error
    connection.unregister("frame")
    return iter(records)


def _lines(text: str) -> list[str]:
    # Not `splitlines`, which also splits at characters that a title may hold.
    return [line.rstrip("\r") for line in text.split("\n") if line]


def _recbole_items(text: str) -> list[dict]:
    rows = (line.split("\t") for line in _lines(text)[1:])
    # recbole has cut the last brackets off GroupLens's titles, and misspells the one that has none.
    return [_record(raw_id, "unknown" if title == "unkonwn" else f"{title} ({year})", genres.split())
            for raw_id, title, year, genres in rows]


def _grouplens_items(text: str) -> list[dict]:
    records = []
    for line in _lines(text):
        raw_id, title, *_, = fields = line.split("|")
        flagged = zip(GENRES, fields[-len(GENRES):], strict=True)
        records.append(_record(raw_id, title, [genre for genre, flag in flagged if flag == "1"]))
    return records


def _record(raw_id: str, title: str, genres: list[str]) -> dict:
    """A record from GroupLens's title, `Usual Suspects, The (1995)`."""
    year = YEAR.search(title)
    # "The Usual Suspects" reads, and embeds, better: it is how people say it.
    return {"raw_id": raw_id, "title": ARTICLE.sub(r"\2 \1", YEAR.sub("", title)),
            "year": year.group(1) if year else "", "genres": ", ".join(genres)}
