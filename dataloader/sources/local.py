"""The source `local`: your own files in CSV, TSV, JSON lines, Parquet, or RecBole's atomic format."""

from pathlib import Path

from common.errors import ConfigError, DataError, closest, nearest
from dataloader.options import ProcessOptions
from dataloader.readers.delimited import Layout
from dataloader.readers.raw import RawTable, existing_columns
from dataloader.workspace import Workspace

ATOMIC = ("csv", Layout("\t", quote="", typed=True))  # RecBole's atomic files
FORMATS = {".csv": ("csv", Layout()), ".tsv": ("csv", Layout("\t", lenient=True)), ".inter": ATOMIC, ".item": ATOMIC,
           **dict.fromkeys((".jsonl", ".json", ".ndjson"), ("json", Layout())),
           **dict.fromkeys((".parquet", ".pq"), ("parquet", Layout()))}
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "vertical bars"}


def raw_paths(options: ProcessOptions) -> list[Path]:
    """Return the paths of the interactions file and, if there is one, the items file.

    A file that no flag names is searched for in the raw folder. Raises DataError if there is no interactions file.
    Raises ConfigError if several files match.
    """
    interactions = options.local.interactions or _found(options, "interactions")
    if interactions is None:
        names = ", ".join(name.format(dataset=options.folder.name) for name in options.config["interactions"]["files"])
        raise DataError(options.raw, "has no interactions file",
                        f"Looked for {names}. Known extensions are {', '.join(FORMATS)}", "use --interactions FILE")
    items = options.local.items or _found(options, "items")
    return [interactions] if items is None else [interactions, items]


def _found(options: ProcessOptions, part: str) -> Path | None:
    for pattern in options.config[part]["files"]:
        found = [path for path in sorted(options.raw.glob(pattern.format(dataset=options.folder.name)))
                 if _ending(path) in FORMATS and not path.name.endswith(".meta.json")]
        if len(found) > 1:
            raise ConfigError(options.raw, f"has several {part} files", ", ".join(path.name for path in found),
                              f"choose one with --{part} FILE")
        if found:
            return found[0]
    return None


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Return the table of interactions and, if there is an items file, the table of items.

    Raises ConfigError if a required column is missing. In a check, the table lacks this column instead. If the check
    cannot read a file at all, the format of its table is "".
    """
    tables, named = [], (options.local.columns, options.local.item_columns)
    for path, part, columns in zip(paths, ("interactions", "items"), named, strict=False):
        tables.append(RawTable(path, "", {}))
        with work.recording():
            tables[-1] = _table(work, path, part, options.config[part]["columns"], columns)
    return tables


def _table(work: Workspace, path: Path, part: str, defaults: dict[str, str], named: dict[str, str | None]) -> RawTable:
    """Return the table of a file, with the fields whose columns exist in the file.

    defaults: field -> default name of its column
    named: field -> the column name that a flag gives, or None

    Raises ConfigError if a required column, or a column that a flag names, does not exist.
    """
    format_, layout = FORMATS.get(_ending(path), ("", Layout()))
    if not format_ or (format_ == "parquet" and path.suffix == ".gz"):
        raise ConfigError(f"--{part} {path}", f"unknown file extension {''.join(path.suffixes[-2:])!r}",
                          f"Known extensions are {', '.join(FORMATS)}; all except Parquet can be followed by .gz",
                          "convert the file to one of these formats, or correct its extension")
    table = RawTable(path, format_, {}, layout=layout)
    existing = existing_columns(work, table)
    for field, default in defaults.items():
        column = named[field] or default
        column = column.split(":")[0] if layout.typed else column
        if existing.count(column) > 1:
            work.stop(ConfigError(f"{path}:1", f"has {existing.count(column)} columns with the name {column}",
                                  fix="rename all but one of them"))
            continue
        # The first JSON records may lack a text that later records have. If `existing` is empty, no record can be
        # parsed. Raise no error here, because a later error about the first line is more helpful.
        may_follow = table.format == "json" and part == "items" and field != "item" and named[field] is None
        if column in existing or not existing or may_follow:
            table.columns[field] = [column]
        elif named[field] is not None or field in ("user", "item", "time"):
            work.stop(_no_column(table, column, existing,
                                 "--item_id_column" if part == "items" and field == "item" else f"--{field}_column"))
    return table


def _no_column(table: RawTable, column: str, existing: list[str], flag: str) -> ConfigError:
    other = [d for d in OTHER_DELIMITERS if len(existing) == 1 and d in existing[0] and d != table.layout.delimiter]
    if table.format == "csv" and other:
        expected = OTHER_DELIMITERS[table.layout.delimiter]
        return ConfigError(f"{table.path}:1", f"expected {expected} between columns, got {OTHER_DELIMITERS[other[0]]}",
                           f"The line is {existing[0][:80]!r}", "rename the file to .tsv" if other[0] == "\t" else
                           "rename the file to .csv" if other[0] == "," else "save the file as .csv with commas")
    return ConfigError(f"{flag} {column}", f"column not found in {table.path}", nearest(column, existing),
                       f"use {flag} {closest(column, existing) or 'NAME'}")
