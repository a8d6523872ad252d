"""Sources of raw files: one module per family, with one YAML in configs/ per source of the family.

A family module has `raw_paths(options)`, which returns the files to read, and `raw_tables(options, paths, work)`, which
returns a `readers.raw.RawTable` for the interactions, and one for the items if there are any.
"""

import importlib
from types import ModuleType

from common.errors import DataError
from dataloader.flags import source_configs
from dataloader.options import ProcessOptions
from dataloader.readers.lines import NAMES, PARSERS
from dataloader.readers.raw import RawTable, existing_columns
from dataloader.workspace import Workspace

# The fields that identify the source of a file. Other fields may be missing in some records.
KNOWN_BY = {"interactions": ("user", "item", "time", "rating"), "items": ("item", "title")}
NUM_LISTED = 20


def family(options: ProcessOptions) -> ModuleType:
    return importlib.import_module(f"dataloader.sources.{options.config['reader']}")


def refuse_other_source(work: Workspace, table: RawTable, part: str, source: str, absent: list[str],
                        optional: bool = False) -> None:
    """Raise DataError if the file does not have the columns of the fields `absent`, which have no value in any row.

    `part` is "interactions" or "items". The fix names the sources that match the file. If the fields are `optional`, a
    file that matches no other source raises nothing.
    """
    found = existing_columns(work, table)
    if all(set(table.columns[field]) & set(found) for field in absent):
        return
    others = []  # the sources that match the file: it has their identifying columns and those of the absent fields
    # If no record can be parsed in the format of `source`, another source matches by its format and its column of ids.
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
    fix = f"use --source local --{part} {table.path}, and --<field>_column NAME for columns with other names"
    if table.source:
        fix = "download the archive again with --force"
    elif others:
        fix = f"use --source {' or '.join(others)}" + (
            f" --raw_dir {table.path.parent} instead of --{part}" if source == "local" else "")
    raise DataError(table.origin, what, f"Expected: {needed}; found: {', '.join(found[:NUM_LISTED]) or 'none'}", fix)
