"""A user's own files: CSV, TSV, JSON lines or Parquet, and RecBole's atomic files."""

from pathlib import Path

from common.errors import ConfigError, DataError, closest, nearest
from dataloader.options import ProcessOptions
from dataloader.readers.delimited import Layout
from dataloader.readers.raw import RawTable, existing_columns
from dataloader.workspace import Workspace

ATOMIC = ("csv", Layout("\t", quote="", typed=True))  # RecBole's
FORMATS = {".csv": ("csv", Layout()), ".tsv": ("csv", Layout("\t")), ".inter": ATOMIC, ".item": ATOMIC,
           **dict.fromkeys((".jsonl", ".json", ".ndjson"), ("json", Layout())),
           **dict.fromkeys((".parquet", ".pq"), ("parquet", Layout()))}
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}


def raw_paths(options: ProcessOptions) -> list[Path]:
    """The interactions, and the items if there are any, by flag or by name."""
    interactions = options.local.interactions or _found(options, "interactions")
    if interactions is None:
        names = ", ".join(name.format(dataset=options.folder.name) for name in options.config["interactions"]["files"])
        raise DataError(options.raw, "has no interactions", f"looked for {names} as {', '.join(FORMATS)}",
                        "name them: --interactions FILE")
    items = options.local.items or _found(options, "items")
    return [interactions] if items is None else [interactions, items]


def _found(options: ProcessOptions, part: str) -> Path | None:
    for pattern in options.config[part]["files"]:
        found = [path for path in sorted(options.raw.glob(pattern.format(dataset=options.folder.name)))
                 if _ending(path) in FORMATS and not path.name.endswith(".meta.json")]
        if len(found) > 1:
            raise ConfigError(options.raw, f"holds several files of {part}", ", ".join(path.name for path in found),
                              f"name the one: --{part} FILE")
        if found:
            return found[0]
    return None


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Interactions, and items if there is a file of them. Raises ConfigError for a column that is not there."""
    named = (options.local.columns, options.local.item_columns)
    return [_table(work, path, part, options.config[part]["columns"], columns)
            for path, part, columns in zip(paths, ("interactions", "items"), named, strict=False)]


def _table(work: Workspace, path: Path, part: str, defaults: dict[str, str], named: dict[str, str | None]) -> RawTable:
    """A file without the optional columns that it lacks; a column that is `named` is not optional."""
    format_, layout = FORMATS.get(_ending(path), ("", Layout()))
    if not format_ or (format_ == "parquet" and path.suffix == ".gz"):
        raise ConfigError(f"--{part} {path}", f"its ending {''.join(path.suffixes[-2:])!r} names no format that can be "
                          "read", f"there are: {', '.join(FORMATS)}, each also with .gz but Parquet", "rename the file")
    table = RawTable(path, format_, {}, layout=layout)
    there = existing_columns(work, table)
    for field, default in defaults.items():
        column = named[field] or default
        column = column.split(":")[0] if layout.typed else column
        if there.count(column) > 1:
            raise ConfigError(f"{path}:1", f"names the column {column} {there.count(column)} times",
                              fix="rename the others")
        # A record of JSON may lack a text that others have; and where no record can be read, its line says more.
        may_come = table.format == "json" and part == "items" and field != "item" and named[field] is None
        if column in there or not there or may_come:
            table.columns[field] = [column]
        elif named[field] is not None or field in ("user", "item", "time"):
            raise _no_column(table, column, there,
                             "--item_id_column" if part == "items" and field == "item" else f"--{field}_column")
    return table


def _no_column(table: RawTable, column: str, there: list[str], flag: str) -> ConfigError:
    other = [d for d in OTHER_DELIMITERS if len(there) == 1 and d in there[0] and d != table.layout.delimiter]
    if table.format == "csv" and other:
        expected = OTHER_DELIMITERS[table.layout.delimiter]
        return ConfigError(f"{table.path}:1", f"has {OTHER_DELIMITERS[other[0]]} between the columns, not {expected}",
                           f"it reads {there[0][:80]!r}", "name the file .tsv" if other[0] == "\t" else
                           "name the file .csv" if other[0] == "," else "save it with commas, as .csv")
    return ConfigError(f"{flag} {column}", f"{table.path} has no such column", nearest(column, there),
                       f"{flag} {closest(column, there) or 'NAME'}")
