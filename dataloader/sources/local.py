"""The source `local`: your own files in CSV, TSV, JSON lines, Parquet, or RecBole's atomic format."""

import glob
import logging
import shlex
from contextlib import suppress
from pathlib import Path

from common.errors import ConfigError, DataError, closest, nearest
from dataloader.options import FileLayout, ProcessOptions, timestamp_of
from dataloader.readers.delimited import Layout, first_row, header
from dataloader.readers.folders import readable
from dataloader.readers.lines import PARSERS, first_format
from dataloader.readers.nested import aligned, list_fix, nested_columns, sequences
from dataloader.readers.raw import RawTable, existing_columns
from dataloader.readers.recognition import SEPARATORS, STRICT, first_lines, other_format, separators
from dataloader.sources import ROLES
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

ATOMIC = ("csv", Layout("\t", quote="", typed=True))  # RecBole's atomic files
FORMATS = {".csv": ("csv", Layout()), ".tsv": ("csv", Layout("\t", lenient=True)), ".inter": ATOMIC, ".item": ATOMIC,
           **dict.fromkeys((".jsonl", ".json", ".ndjson"), ("json", Layout())),
           **dict.fromkeys((".parquet", ".pq"), ("parquet", Layout()))}
# Files with these extensions are only read if a flag names them; in a folder, such a file may be a description.
TEXTS = dict.fromkeys((".txt", ".dat", ".data"), FORMATS[".csv"])
NAMED_SEPARATORS = {"tab": "\t", "\\t": "\t", "space": " "}  # for --separator; a shell does not know \t
NAMES_OF_SEPARATORS = {"\t": "tab", " ": "space"}
NUM_LISTED = 10
REQUIRED = ("user", "item", "time")  # the fields that a file must have
SPLITS = ("train", "valid", "test")  # RecBole's benchmark files


def raw_paths(options: ProcessOptions) -> list[Path]:
    """Return the paths of the interactions file and, if there is one, the items file.

    If no flag gives the path of a file, the file is searched for in the raw folder. Raises DataError if there is no
    interactions file. Raises ConfigError if several files match.
    """
    interactions = options.local.interactions or _found(options, "interactions")
    if interactions is None:
        _refuse_split_files(options)
        names = ", ".join(name.format(dataset=options.folder.name) for name in options.config["interactions"]["files"])
        raise DataError(options.raw, "has no interactions file",
                        f"Looked for {names}. Known extensions are {', '.join(FORMATS)}",
                        readable(options.raw, options.folder.name) or "use --interactions FILE")
    items = options.local.items or _found(options, "items")
    return [interactions] if items is None else [interactions, items]


def _found(options: ProcessOptions, part: str) -> Path | None:
    for pattern in options.config[part]["files"]:
        found = [path for path in sorted(options.raw.glob(pattern.format(dataset=options.folder.name)))
                 if path.is_file() and _ending(path) in FORMATS and not path.name.endswith(".meta.json")]
        if len(found) > 1:
            raise ConfigError(options.raw, f"has several {part} files", ", ".join(path.name for path in found),
                              f"choose one with --{part} FILE")
        if found:
            return found[0]
    return None


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _format(path: Path) -> tuple[str, Layout]:
    """Return the format and the layout for the file extension. The format for an unknown extension is ""."""
    return (FORMATS | TEXTS).get(_ending(path), ("", Layout()))


def _refuse_split_files(options: ProcessOptions) -> None:
    """Raise DataError with the command that joins RecBole's benchmark files, if the raw folder has such files."""
    name = options.folder.name
    order = {f"{name}.{split}.inter": place for place, split in enumerate(SPLITS)}
    files = sorted(options.raw.glob(f"{glob.escape(name)}.*.inter"), key=lambda path: (order.get(path.name, 1), path))
    if not files:
        return
    headers = {path.name: (first_lines(path) or [""])[0] for path in files}
    joined = f"awk 'FNR > 1 || NR == 1' {shlex.join(map(str, files))} > {shlex.quote(str(options.raw / name))}.inter"
    raise DataError(options.raw, f"has the interactions in {len(files)} files: {', '.join(headers)}",
                    "This program reads one file, and splits the interactions itself (--split)",
                    f"join the files with: {joined}" if len(set(headers.values())) == 1 else
                    "give the files the same columns, and join them")


def raw_tables(options: ProcessOptions, paths: list[Path], work: Workspace) -> list[RawTable]:
    """Return the table of interactions and, if there is an items file, the table of items.

    Raises ConfigError if a required column is missing, or if a flag for the layout has no effect. A check
    records these errors and continues: the table then lacks the column. If a check cannot read a file at all, the
    format of its table is "".
    """
    named, flags = (options.local.columns, options.local.item_columns), options.local.layout
    text_parts = [part for part, path in zip(ROLES, paths, strict=False) if _format(path)[0] == "csv"]
    for part in ROLES:
        if flags.no_header in (part, "both") and part not in text_parts:
            work.stop(ConfigError(f"--no_header {flags.no_header}", f"there is no CSV or TSV file with the {part}",
                                  "The flag has no effect on other files", "leave it out, or name the other part"))
    if flags.items_separator and "items" not in text_parts:
        work.stop(ConfigError("--items_separator", "there is no CSV or TSV file with the items", fix="leave it out"))
    elif flags.settings and not text_parts:
        work.stop(ConfigError(f"--{next(iter(flags.settings))}", "has no effect, because no file is a CSV or TSV file",
                              fix="leave it out"))
    tables = []
    for path, part, columns in zip(paths, ROLES, named, strict=False):
        tables.append(RawTable(path, "", {}))
        with work.recording():
            tables[-1] = _table(work, path, part, options.config[part]["columns"], columns, flags)
    return tables


def _table(work: Workspace, path: Path, part: str, defaults: dict[str, str], named: dict[str, str | None],
           flags: FileLayout) -> RawTable:
    """Return the table of a file, with the fields whose columns exist in the file.

    defaults: field -> default name of its column
    named: field -> the column name that a flag gives, or None

    Raises ConfigError if a required column, or a column that a flag names, does not exist. Raises DataError if the file
    is in another format than its extension says.
    """
    format_, layout = _format(path)
    if not format_ or (format_ == "parquet" and path.suffix == ".gz"):
        raise ConfigError(f"--{part} {path}", f"unknown file extension {''.join(path.suffixes[-2:])!r}",
                          f"Known extensions are {', '.join(FORMATS | TEXTS)}; all except Parquet can be followed by "
                          ".gz", "convert the file to one of these formats, or correct its extension")
    wanted = {field: default if named[field] is None else named[field] for field, default in defaults.items()}
    keys = tuple(wanted[field] for field in ("user", "item", "time") if field in wanted)
    if format_ != "parquet" and (error := other_format(path, format_, keys)):
        raise error
    if format_ == "json" and first_format(path) == "python":
        format_ = "python"
    if format_ == "csv":
        layout = _layout(path, part, layout, flags, set(wanted.values()))
    table = RawTable(path, format_, {}, layout=layout)
    existing = existing_columns(work, table)
    for field, column in wanted.items():
        if column == "" and field not in REQUIRED:
            continue  # the flag says that there is no such column
        column = column.split(":")[0] if layout.typed else column
        column = column.strip() if format_ == "csv" else column  # as in the header
        if existing.count(column) > 1:
            work.stop(ConfigError(f"{path}:1", f"has {existing.count(column)} columns with the name {column}",
                                  fix="rename all but one of them"))
            continue
        # The first JSON records may lack a text that later records have. If `existing` is empty, no record can be
        # parsed. Raise no error here, because a later error about the first line is more helpful.
        may_follow = format_ in PARSERS and part == "items" and field != "item" and named[field] is None
        if layout.typed and field in ("user", "item", "time") and column in (typed := sequences(path, layout)):
            work.stop(DataError(f"{path}:1", f"the column {typed[column]} has several values in each line",
                                f"The {field} must be one text or number", list_fix(table, [column])))
        elif column in existing or not existing or may_follow:
            table.columns[field] = [column]
        elif named[field] is not None or field in REQUIRED:
            work.stop(_no_column(work, table, column, existing, part,
                                 "--item_id_column" if part == "items" and field == "item" else f"--{field}_column"))
    return table


def _layout(path: Path, part: str, usual: Layout, flags: FileLayout, wanted: set[str]) -> Layout:
    """Return the layout of a CSV or TSV file from the flags. Without --separator, also use the first lines of the file.

    usual: the layout for the file extension
    wanted: the names of the needed columns; if the first line has one of them, the usual separator is kept
    """
    headless, separator = flags.no_header in (part, "both"), usual.delimiter
    quote = {None: usual.quote, "none": "", "double": '"'}[flags.quoting]
    layout, names = usual._replace(quote=quote, escape=flags.escape or ""), set[str]()
    if given := (part == "items" and flags.items_separator) or flags.separator:
        separator = NAMED_SEPARATORS.get(given, given)
    else:
        with suppress(DataError):  # with another separator, the first line may be valid
            names = set() if headless else set(header(path, layout))
        found = [] if wanted & names else separators(path, layout)
        separator = found[0] if len(found) == 1 else separator
    if separator != usual.delimiter:
        words = SEPARATORS.get(separator, repr(separator))
        log.info("process: the columns of %s are separated by %s", path.name, words)
    layout = layout._replace(delimiter=separator, lenient=flags.quoting is None and separator not in STRICT)
    try:
        first = first_row(path, layout)
    except DataError as error:
        raise _wrong_separator(path, part, layout, wanted) or error from error
    return layout._replace(header=tuple(str(n) for n, _ in enumerate(first, start=1))) if headless else layout


def _wrong_separator(path: Path, part: str, layout: Layout, wanted: set[str]) -> ConfigError | None:
    """Return the error for a file that has other separators, or None."""
    line = (first_lines(path) or [""])[0]
    found = separators(path, layout) or [
        separator for separator in SEPARATORS if wanted & set(map(str.strip, line.split(separator)))]
    if not found or layout.delimiter in found:
        return None
    flag, shown = f"--{'items_' * (part == 'items')}separator", [NAMES_OF_SEPARATORS.get(each, each) for each in found]
    return ConfigError(f"{path}:1", f"does not have columns with the separator {layout.delimiter!r}",
                       f"The line is {line[:80]!r}", f"use {flag} {' or '.join(map(shlex.quote, shown))}")


def _no_column(work: Workspace, table: RawTable, column: str, existing: list[str], part: str, flag: str) -> ConfigError:
    where = f"{table.path}:1"
    if table.format == "csv" and len(existing) == 1 and (
            error := _wrong_separator(table.path, part, table.layout, {column})):
        return error
    if table.format == "csv" and table.layout.header is None and any(map(_is_value, existing)):
        return ConfigError(where, f"has no column {column}, and its first line has values instead of column names",
                           f"The first line begins with the values {', '.join(existing[:NUM_LISTED])}",
                           f"use --no_header {part}, and {flag} with the number of the column, from 1 to "
                           f"{len(existing)}")
    nested, likely = nested_columns(work, table), closest(column, existing)
    if likely in nested and isinstance(nested[likely][0], list) and flag != "--item_id_column":
        return ConfigError(f"{flag} {column}", f"column not found in {table.path}",
                           f"The column {likely} has a list in each line",
                           f"{list_fix(table, aligned(nested, likely))}, and use {flag} {shlex.quote(likely)}")
    scalars = [name for name in existing if name not in nested] or existing
    close = closest(column, scalars) or "NAME"
    return ConfigError(f"{flag} {column}", f"column not found in {table.path}", nearest(column, scalars),
                       f"use {flag}{'=' if close.startswith('-') else ' '}{shlex.quote(close)}")


def _is_value(text: str) -> bool:
    """Return whether a text is a number or a date, and so most likely not the name of a column."""
    with suppress(ValueError):
        float(text)
        return True
    return timestamp_of(text) is not None
