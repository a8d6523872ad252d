"""Where raw files are from: one module a family, each with a YAML in configs/ for every layout of its files.

A family offers `raw_paths(options)`, the files it reads, and `raw_tables(options, paths, work)`, which says of the
interactions, and of the items where there are any, how they are read (`readers.raw.RawTable`).
"""

import importlib
from types import ModuleType

from common.errors import DataError
from dataloader.options import ProcessOptions, source_configs
from dataloader.readers.lines import PARSERS
from dataloader.readers.raw import RawTable, existing_columns
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
    found = existing_columns(work, table)
    if all(set(table.columns[field]) & set(found) for field in absent):
        return
    others = []  # the sources of which the file may be: it has there all that a file is known by, and what was missed
    for name, config in source_configs().items():
        if name not in (source, "local") and "files" in config.get(part, {}):
            lines = config["item_lines"] if part == "items" else "json"
            in_its_format = table._replace(format=lines if table.format in PARSERS else table.format)
            there, columns = set(existing_columns(work, in_its_format)), config[part]["columns"]
            known_by = (columns.get(field, []) for field in {*KNOWN_BY[part], *absent})
            if all(there.intersection([names] if isinstance(names, str) else names) for names in known_by):
                others.append(name)
    if not others and (optional or not found):
        return  # where no record can be read, what is wrong with the first line says more
    needed = ", ".join(" or ".join(columns) for columns in table.columns.values())
    shown = ", ".join(found[:NUM_LISTED]) or f"no record of {table.format}"
    fix = f"--source local --{part} {table.path}, with --<field>_column NAME for columns of other names"
    if table.source:
        fix = "fetch the archive again (--force)"
    elif others:
        fix = f"--source {' or '.join(others)}" + (
            f" --raw_dir {table.path.parent} in place of --{part}" if source == "local" else "")
    raise DataError(table.origin, f"has no {' and no '.join(absent)}", f"needed: {needed}; found: {shown}", fix)
