"""MovieLens 100k, as GroupLens packs it or out of the recbole package."""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd

from common.errors import DataError

GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
ARTICLE = re.compile(r"^(.*), (The|A|An)(?=$| \()")


def raw_paths(raw: Path, dataset: str) -> list[Path]:
    """The one archive that holds the data set."""
    candidates = [raw / f"{dataset}.zip", *sorted(raw.glob("recbole-*.whl"))]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise DataError(raw, "has no archive", f"looked for {dataset}.zip and recbole-*.whl",
                        f"bash dataloader/0_download_dataset.sh --dataset {dataset}")
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
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(path, "is not the expected archive", str(error), "fetch it again (--force)") from error
    # Everything is text at first: ids stay as they are written.
    frame = pd.read_csv(io.BytesIO(events), sep="\t", header=None, dtype=str, keep_default_na=False,
                        names=["raw_user", "raw_item", "rating", "timestamp"])
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


def _recbole_items(text: str) -> list[dict]:
    rows = (line.split("\t") for line in text.splitlines()[1:] if line)
    return [_record(raw_id, title, year, genres.split()) for raw_id, title, year, genres in rows]


def _grouplens_items(text: str) -> list[dict]:
    records = []
    for line in text.splitlines():
        raw_id, title, *_, = fields = line.split("|")
        year = YEAR.search(title)
        flags = fields[-len(GENRES):]
        records.append(_record(raw_id, YEAR.sub("", title), year.group(1) if year else "",
                               [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"]))
    return records


def _record(raw_id: str, title: str, year: str, genres: list[str]) -> dict:
    # "Usual Suspects, The" reads, and embeds, better the way people say it.
    title = ARTICLE.sub(r"\2 \1", title)
    return {"raw_id": raw_id, "title": title, "year": year, "genres": ", ".join(genres)}
