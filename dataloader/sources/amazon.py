"""Amazon product reviews of 2014, 2018 and 2023: gzipped files, one record per line; see the YAML of each year."""

from pathlib import Path

from common.errors import DataError
from dataloader.options import ProcessOptions
from dataloader.readers.raw import RawTable
from dataloader.workspace import Workspace


def raw_paths(options: ProcessOptions) -> list[Path]:
    """Return the paths of the review file and, if it exists, the metadata file.

    Raises DataError if a file is missing. With --raw_dir, the metadata file is optional.
    """
    dataset, fix = options.folder.name, f"bash dataloader/0_download_dataset.sh --dataset {options.folder.name} --force"
    reviews, metadata = ([options.raw / name.format(dataset=dataset) for name in options.config[part]["files"]]
                         for part in ("interactions", "items"))
    found, items = (next((path for path in paths if path.is_file()), None) for paths in (reviews, metadata))
    if found is None:
        raise DataError(options.raw, "has no review file", "Looked for " + ", ".join(p.name for p in reviews), fix)
    if items is None and options.downloads:
        raise DataError(metadata[0], "not found", "This file contains the item texts", fix)
    return [found] if items is None else [found, items]


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Return the table of interactions and, if there is a metadata file, the table of items."""
    formats = ("json", options.config["item_lines"])
    columns = ({field: names if isinstance(names, list) else [names]
                for field, names in options.config[part]["columns"].items()} for part in ("interactions", "items"))
    return [RawTable(*each) for each in zip(paths, formats, columns, strict=False)]
