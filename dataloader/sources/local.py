"""A user's own files: CSV, TSV, JSON lines or Parquet, and RecBole's atomic files."""

from pathlib import Path

from common.errors import ConfigError, DataError, nearest
from dataloader.options import DataOptions
from dataloader.sources.tables import RawTable, columns_there
from dataloader.workspace import Workspace

FORMATS = {".csv": "csv", ".tsv": "csv", ".inter": "csv", ".item": "csv", ".jsonl": "json", ".json": "json",
           ".ndjson": "json", ".parquet": "parquet", ".pq": "parquet"}


def raw_paths(options: DataOptions) -> list[Path]:
    """The interactions, and the items if there are any, by flag or by name."""
    interactions = options.local.interactions or _found(options, "interactions")
    if interactions is None:
        names = ", ".join(name.format(dataset=options.folder.name) for name in options.config["interactions"]["files"])
        raise DataError(options.raw, "has no interactions", f"looked for {names} as {', '.join(FORMATS)}",
                        "name them: --interactions FILE")
    items = options.local.items or _found(options, "items")
    return [interactions] if items is None else [interactions, items]


def _found(options: DataOptions, part: str) -> Path | None:
    for pattern in options.config[part]["files"]:
        for path in sorted(options.raw.glob(pattern.format(dataset=options.folder.name))):
            if _ending(path) in FORMATS:
                return path
    return None


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def raw_tables(options: DataOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Interactions, and items if there is a file of them. Raises ConfigError for a column that is not there."""
    named = (options.local.columns, options.local.item_columns)
    tables = [_table(options, path, part, columns)
              for path, part, columns in zip(paths, ("interactions", "items"), named, strict=False)]
    return [_only_columns_there(work, table, columns) for table, columns in zip(tables, named, strict=False)]


def _table(options: DataOptions, path: Path, part: str, named: dict[str, str | None]) -> RawTable:
    ending = _ending(path)
    if ending not in FORMATS:
        raise ConfigError(f"--{part} {path}", f"its ending {ending!r} names no format that can be read",
                          "there are: " + ", ".join(FORMATS) + ", each also with .gz but Parquet", "rename the file")
    columns = {field: [named[field] or default] for field, default in options.config[part]["columns"].items()}
    atomic = ending in (".inter", ".item")
    return RawTable(path, FORMATS[ending], columns, delimiter="\t" if atomic or ending == ".tsv" else ",",
                    quote="" if atomic else '"')


def _only_columns_there(work: Workspace, table: RawTable, named: dict[str, str | None]) -> RawTable:
    """Without the optional columns that the file lacks. Raises ConfigError for one that it must have."""
    there = columns_there(work, table)
    flags = {"item": "item_id" if "title" in table.columns else "item"}
    columns = {}
    for field, [column] in table.columns.items():
        # A record of JSON may lack a field that others have; only ratings are there for all or none.
        if column in there or (table.format == "json" and named[field] is None and field != "rating"):
            columns[field] = [column]
        elif named[field] is not None or field in ("user", "item", "time"):
            flag = f"--{flags.get(field, field)}_column"
            raise ConfigError(f"{flag} {column}", f"{table.path} has no such column", nearest(column, there),
                              f"{flag} NAME")
    return table._replace(columns=columns)
