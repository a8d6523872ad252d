"""Amazon product reviews of 2014, 2018 and 2023: gzipped files, one record per line; see the YAML of each year."""

from pathlib import Path

from common.errors import DataError
from dataloader.options import ProcessOptions
from dataloader.readers.folders import readable
from dataloader.readers.raw import RawTable
from dataloader.sources import find, replacement
from dataloader.workspace import Workspace


def raw_paths(options: ProcessOptions) -> list[Path]:
    """Return the paths of the review file and, if it exists, the metadata file.

    Raises DataError if a file is missing. With --raw_dir, the metadata file is optional.
    """
    found, items = find(options, "interactions"), find(options, "items")
    reviews, metadata = (", ".join(name.format(dataset=options.folder.name) for name in options.config[part]["files"])
                         for part in ("interactions", "items"))
    if found is None:
        raise DataError(options.raw, "has no review file", f"Looked for {reviews}, also unpacked or as .jsonl",
                        replacement(options, readable(options.raw, options.folder.name) or
                                    "copy one of these files to the folder"))
    if items is None and options.downloads:
        raise DataError(options.raw / metadata, "not found", "This file contains the item texts",
                        replacement(options, ""))
    return [found] if items is None else [found, items]


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Return the table of interactions and, if there is a metadata file, the table of items."""
    formats = ("json", options.config["item_lines"])
    columns = ({field: names if isinstance(names, list) else [names]
                for field, names in options.config[part]["columns"].items()} for part in ("interactions", "items"))
    return [RawTable(*each) for each in zip(paths, formats, columns, strict=False)]
