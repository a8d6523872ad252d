"""Where raw files are from: one module a family, each with a YAML in configs/ for every layout of its files.

A family offers `raw_paths(options)`, the files it reads, and `raw_tables(options, paths, work)`, which says of the
interactions, and of the items where there are any, how they are read (`readers.raw.RawTable`).
"""

import importlib
from types import ModuleType

from common.errors import DataError
from dataloader.options import ProcessOptions, source_configs
from dataloader.readers.lines import PARSERS
from dataloader.readers.raw import RawTable, columns_there
from dataloader.workspace import Workspace

# The fields by which a file is known; not every record has the others.
KNOWN_BY = {"interactions": ("user", "item", "time", "rating"), "items": ("item", "title")}
NUM_LISTED = 20


def family(options: ProcessOptions) -> ModuleType:
    return importlib.import_module(f"dataloader.sources.{options.config['reader']}")


def refuse_other_source(work: Workspace, table: RawTable, part: str, source: str, absent: list[str],
                        optional: bool = False) -> None:
    """Raise DataError if fields that no row has are those of another source, or have no columns at all.

    `part` is interactions or items. A file that has the columns, with useless values, is let through; and where the
    fields are `optional`, one that is of no other source.
    """
    found = columns_there(work, table)
    if all(set(table.columns[field]) & set(found) for field in absent):
        return
    others = _others(work, table, part, source, absent)
    if not others and (optional or not found):
        return  # where no record can be read, what is wrong with the first line says more
    needed = ", ".join(" or ".join(columns) for columns in table.columns.values())
    there = ", ".join(found[:NUM_LISTED]) or f"no record of {table.format}"
    fix = f"--source local --{part} {table.path}, with --<field>_column NAME for columns of other names"
    if table.source:
        fix = "fetch the archive again (--force)"
    elif others:
        fix = f"--source {' or '.join(others)}" + (
            f" --raw_dir {table.path.parent} in place of --{part}" if source == "local" else "")
    raise DataError(table.origin, f"has no {' and no '.join(absent)}", f"needed: {needed}; found: {there}", fix)


def _others(work: Workspace, table: RawTable, part: str, source: str, absent: list[str]) -> list[str]:
    """The sources of which the file may be: it has there all that a file is known by, and what was missed."""
    others = []
    for name, config in source_configs().items():
        if name in (source, "local") or "files" not in config.get(part, {}):
            continue
        columns = {field: [names] if isinstance(names, str) else names
                   for field, names in config[part]["columns"].items()}
        format_ = table.format
        if format_ in PARSERS:
            format_ = config["item_lines"] if part == "items" else "json"
        there = set(columns_there(work, table._replace(format=format_, columns=columns)))
        if all(set(columns.get(field, ())) & there for field in {*KNOWN_BY[part], *absent}):
            others.append(name)
    return others
