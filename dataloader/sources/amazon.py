"""Amazon product reviews of 2014, 2018 and 2023: gzipped lines, whose fields the YAML of the year names."""

from pathlib import Path

from common.errors import DataError
from dataloader.options import ProcessOptions
from dataloader.readers.raw import RawTable
from dataloader.workspace import Workspace


def raw_paths(options: ProcessOptions) -> list[Path]:
    """The review file, and the metadata file if there is one (a folder of one's own may lack it)."""
    dataset, fix = options.folder.name, f"bash dataloader/0_download_dataset.sh --dataset {options.folder.name} --force"
    reviews, metadata = ([options.raw / name.format(dataset=dataset) for name in options.config[part]["files"]]
                         for part in ("interactions", "items"))
    found, items = (next((path for path in paths if path.exists()), None) for paths in (reviews, metadata))
    if found is None:
        raise DataError(options.raw, "has no review file", "looked for " + ", ".join(p.name for p in reviews), fix)
    if items is None and options.downloads:
        raise DataError(metadata[0], "not there", "the items' texts are in it", fix)
    return [found] if items is None else [found, items]


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Interactions, and items if there is a file of them."""
    formats = ("json", options.config["item_lines"])
    columns = ({field: names if isinstance(names, list) else [names]
                for field, names in options.config[part]["columns"].items()} for part in ("interactions", "items"))
    return [RawTable(*each) for each in zip(paths, formats, columns, strict=False)]
