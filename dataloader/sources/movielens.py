"""MovieLens 100k, 1m, 20m and 32m, as GroupLens packs them, and 100k out of the recbole package too."""

import csv
import io
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from dataloader.options import DataOptions
from dataloader.sources.tables import RawTable
from dataloader.workspace import Workspace

GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
YEAR = re.compile(r"\s*\((\d{4})(?:[-–]\d{0,4})?\)(?:\s*\(V\))?\s*$")
ARTICLE = re.compile(r"^(.*), (The|A|An)(?=$| \()")
COLUMNS = ("user", "item", "rating", "time")
RECBOLE = "recbole/dataset_example/ml-100k/ml-100k"
# data set -> its two members, and the delimiter of both
LAYOUTS = {"ml-100k": ("ml-100k/u.data", "ml-100k/u.item", "\t"),
           "ml-1m": ("ml-1m/ratings.dat", "ml-1m/movies.dat", "::"),
           "ml-20m": ("ml-20m/ratings.csv", "ml-20m/movies.csv", ","),
           "ml-32m": ("ml-32m/ratings.csv", "ml-32m/movies.csv", ",")}


def raw_paths(options: DataOptions) -> list[Path]:
    """The one archive that holds the data set."""
    dataset = options.folder.name
    wheels = sorted(options.raw.glob("recbole-*.whl")) if dataset in options.config["wheels"] else []
    found = next((path for path in [options.raw / f"{dataset}.zip", *wheels] if path.exists()), None)
    if found is None:
        raise DataError(options.raw, "has no archive", f"looked for {dataset}.zip"
                        + (" and recbole-*.whl" if dataset in options.config["wheels"] else ""),
                        f"bash dataloader/0_download_dataset.sh --dataset {dataset} --force")
    return [found]


def raw_tables(options: DataOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Interactions and items, taken out of the archive."""
    [path] = paths
    packaged = path.suffix == ".whl"
    events, items, delimiter = (f"{RECBOLE}.inter", f"{RECBOLE}.item", "\t") if packaged else LAYOUTS.get(
        options.folder.name, LAYOUTS["ml-20m"])
    records = _recbole_items if packaged else {"\t": _u_item, "::": _movies_dat, ",": _movies_csv}[delimiter]
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(events) as member, (work.folder / "events").open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
            with archive.open(items) as member, (work.folder / "items.jsonl").open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records(member))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, IndexError, csv.Error) as error:
        raise DataError(path, "is not the expected archive", str(error), "fetch it again (--force)") from error
    headed = packaged or delimiter == ","
    columns = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp"} if packaged else (
        {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"} if headed else
        {column: column for column in COLUMNS})
    return [
        RawTable(work.folder / "events", "csv", {field: [column] for field, column in columns.items()},
                 f"{path}:{events}", delimiter, "", None if headed else COLUMNS),
        RawTable(work.folder / "items.jsonl", "json",
                 {field: [field] for field in ("item", "title", "year", "genres")}, f"{path}:{items}"),
    ]


def _lines(member: io.BufferedIOBase, encoding: str) -> Iterator[str]:
    # Not `splitlines`, which also splits at characters that a title may hold.
    return (line.rstrip("\r\n") for line in io.TextIOWrapper(member, encoding=encoding, newline="\n")
            if line.strip("\r\n"))


def _recbole_items(member: io.BufferedIOBase) -> Iterator[dict]:
    lines = _lines(member, "utf-8")
    next(lines, None)
    for raw_id, title, year, genres in (line.split("\t") for line in lines):
        # recbole has cut the last brackets off GroupLens's titles, and misspells the one that has none.
        yield _record(raw_id, "unknown" if title == "unkonwn" else f"{title} ({year})", genres.split())


def _u_item(member: io.BufferedIOBase) -> Iterator[dict]:
    for line in _lines(member, "latin-1"):
        raw_id, title, *_ = fields = line.split("|")
        flagged = zip(GENRES, fields[-len(GENRES):], strict=True)
        yield _record(raw_id, title, [genre for genre, flag in flagged if flag == "1"])


def _movies_dat(member: io.BufferedIOBase) -> Iterator[dict]:
    for raw_id, title, genres in (line.split("::") for line in _lines(member, "latin-1")):
        yield _record(raw_id, title, genres.split("|"))


def _movies_csv(member: io.BufferedIOBase) -> Iterator[dict]:
    for row in csv.DictReader(io.TextIOWrapper(member, encoding="utf-8", newline="")):
        genres = [] if row["genres"].startswith("(no genres") else row["genres"].split("|")
        yield _record(row["movieId"], row["title"], genres)


def _record(raw_id: str, title: str, genres: list[str]) -> dict:
    """A record from GroupLens's title, `Usual Suspects, The (1995)`."""
    year = YEAR.search(title)
    # "The Usual Suspects" reads, and embeds, better: it is how people say it.
    return {"item": raw_id, "title": ARTICLE.sub(r"\2 \1", YEAR.sub("", title)),
            "year": year.group(1) if year else "", "genres": genres}
