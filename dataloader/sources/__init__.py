"""Sources of raw files: one module per family, with one YAML in configs/ per source of the family.

A family module has two functions. `raw_paths(options)` returns the files to read. `raw_tables(options, paths, work)`
returns a list with the `RawTable` of the interactions and, if there are item records, the `RawTable` of the items.
"""

import importlib
import importlib.util
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from common.errors import ConfigError, DataError
from dataloader.flags import CONFIGS, source_configs
from dataloader.options import ProcessOptions
from dataloader.readers.lines import NAMES, PARSERS, DamagedError
from dataloader.readers.raw import RawTable, existing_columns
from dataloader.workspace import Workspace

# The fields whose columns identify the source of a file. Other fields may be missing in some records.
KNOWN_BY = {"interactions": ("user", "item", "time", "rating"), "items": ("item", "title")}
ROLES = ("interactions", "items")  # the content of the raw files, in the order of `raw_paths`
NUM_LISTED = 20
JSON_ENDINGS = (".json.gz", ".json", ".jsonl.gz", ".jsonl")


def family(options: ProcessOptions) -> ModuleType:
    reader = options.config["reader"]
    if importlib.util.find_spec(f"dataloader.sources.{reader}") is None:
        raise ConfigError(f"{CONFIGS / options.source}.yaml", f"the reader {reader!r} does not exist",
                          "The key `reader` names a module in dataloader/sources/",
                          f"add {reader}.py, or correct the key")
    return importlib.import_module(f"dataloader.sources.{reader}")


def replacement(options: ProcessOptions, own: str) -> str:
    """Return the fix for a raw file that is missing or damaged.

    own: the fix if the file is the user's own, because no command can download such a file again
    """
    folder = options.folder
    if not options.downloads:
        return own
    return (f"bash dataloader/0_download_dataset.sh --dataset {folder.name}{folder.root_flag} --source "
            f"{options.source} --force")


@contextmanager
def with_download(options: ProcessOptions) -> Iterator[None]:
    """In the error about a damaged file, set the fix to the command that downloads the raw files again.

    If step 0 does not download these files, the fix does not change.
    """
    try:
        yield
    except DamagedError as error:
        raise DataError(error.where, error.what, error.why, replacement(options, error.fix)) from error


def find(options: ProcessOptions, part: str) -> Path | None:
    """Return the first existing file of the interactions or items in the raw folder, or None.

    The source's YAML lists the names. The file may be unpacked, or have another usual extension for JSON lines.
    """
    names = [name.format(dataset=options.folder.name) for name in options.config[part]["files"]]
    others = [f"{name.removesuffix('.gz').rpartition('.')[0]}{ending}" for name in names for ending in JSON_ENDINGS]
    return next((path for name in (*names, *others) if (path := options.raw / name).is_file()), None)


def refuse_other_source(work: Workspace, table: RawTable, part: str, source: str, absent: list[str],
                        optional: bool = False) -> None:
    """Raise DataError if the file has no column for at least one of the fields `absent`.

    A file without this column is probably from another source. The error suggests the sources that match the file.

    part: "interactions" or "items"
    absent: fields without a value in any row
    optional: if true, raise the error only if the file matches another source
    """
    found = existing_columns(work, table)
    if all(set(table.columns[field]) & set(found) for field in absent):
        return
    # A source matches if the file has the source's columns for all `fields`. If no record can be parsed in the format
    # of `source`, compare only the id column.
    others = []
    fields = {*KNOWN_BY[part], *absent} if found else {"item"}
    for name, config in source_configs().items():
        if name not in (source, "local") and "files" in config.get(part, {}):
            lines = config["item_lines"] if part == "items" else "json"
            in_its_format = table._replace(format=lines if table.format in PARSERS else table.format)
            available, columns = set(existing_columns(work, in_its_format)), config[part]["columns"]
            known_by = (columns.get(field, []) for field in fields)
            if all(available.intersection([names] if isinstance(names, str) else names) for names in known_by):
                others.append(name)
    if not others and (optional or not found):
        return  # if no record can be parsed, the error about the first line is more helpful
    needed = ", ".join(" or ".join(columns) for columns in table.columns.values())
    what = f"has no column for {' and '.join(absent)}" if found else f"has no {NAMES[table.format]} records"
    file = shlex.quote(str(table.path))
    fix = f"use --source local --{part} {file}, and --<field>_column NAME for columns with other names"
    if table.source:
        fix = "replace the archive by the original one"
    elif others:
        fix = f"use --source {' or '.join(others)}" + (
            f" --raw_dir {shlex.quote(str(table.path.parent))} instead of --{part}" if source == "local" else "")
    raise DataError(table.origin, what, f"Expected: {needed}; found: {', '.join(found[:NUM_LISTED]) or 'none'}", fix)
