"""Hints for a folder without the expected raw files: its files, and the flags that read them."""

import os
import shlex
from pathlib import Path

NUM_LISTED = 10
# The files of the extracted archives of MovieLens.
MOVIELENS = ("u.data", "ratings.dat", "ratings.csv")


def listing(folder: Path) -> str:
    """Return the names of the first files in a folder, for an error."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return ", ".join(names[:NUM_LISTED]) + ", …" * (len(names) > NUM_LISTED) or "no files"


def readable(folder: Path, dataset: str) -> str:
    """Return the fix for a folder whose files have other names than expected, or "" if no file is recognized."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    items = [path for path in files if path.name.lower().startswith("items.")]
    for path in files:
        if path.name.lower().startswith("interactions.") and not path.name.startswith("interactions."):
            return _flags(path, items)
    atomic = [path for path in files if path.suffix == ".inter"]
    if len(atomic) == 1:
        return _flags(atomic[0], [path for path in files if path.name == f"{atomic[0].stem}.item"])
    if (ratings := folder / f"ratings_{dataset}.csv").is_file():  # of Amazon, 2014
        return _flags(ratings, [], "--no_header", "interactions", *(
            f"--{field}_column={place}" for place, field in enumerate(("user", "item", "rating", "time"), start=1)))
    for extracted in (folder / dataset, Path(os.path.abspath(folder))):
        if dataset.startswith("ml-") and extracted.name == dataset and any(
                (extracted / name).is_file() for name in MOVIELENS):
            archive = extracted.with_name(f"{dataset}.zip")
            return (f"pack the folder again with: {shlex.join(['python', '-m', 'zipfile', '-c', str(archive)])} "
                    f"{shlex.quote(str(extracted))}, and use --raw_dir {shlex.quote(str(archive.parent))}")
    return ""


def _flags(interactions: Path, items: list[Path], *more: str) -> str:
    """Return the fix with the flags that name the files, and with more flags."""
    words = ["--source", "local", "--interactions", str(interactions), *(f"--items={path}" for path in items[:1])]
    return f"use {shlex.join([*words, *more])} instead of --raw_dir"
