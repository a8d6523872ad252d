"""Find the columns of a CSV file with semantic IDs: the raw ids, and the codes in the order of the levels."""

import re
from typing import NamedTuple

from common.errors import DataError

# Names of columns, in lower case
RAW_ID = ("raw_id", "item_id", "item", "id")  # in order of priority
ROW_NUMBER = re.compile(r"(unnamed|index)?")  # the row numbers of pandas and R
WHOLE_ID = ("semantic_id", "semantic_ids", "sem_id", "sem_ids", "sid", "sids")
TEXT = ("title", "text", "description")
LEVEL = re.compile(r"(.*?)[ _.-]?(\d{1,2})")  # such as code_0, l1 and 2
FIX = ("rename the column of the raw ids to item_id and the columns of the codes to code_0, code_1, ..., and remove "
       "all other columns")


class Columns(NamedTuple):
    raw_id: int
    codes: list[int]          # in the order of the levels
    ignored: list[str]        # names of other columns that may have codes
    width: int                # number of columns; further cells of a line are codes
    is_unnamed: bool = False  # whether the raw ids are in a first column without a name


def is_header(row: list[str]) -> bool:
    """Return whether a row is certainly a header, even if its other cells look like codes."""
    names = _names(row)
    if any(name in names for name in RAW_ID):
        return True
    return len(row) > 2 and ROW_NUMBER.fullmatch(names[0]) is not None and (
        any(name.endswith("id") for name in names[1:]) or names[1:] == [str(number) for number in range(len(row) - 1)])


def find_columns(header: list[str], where: str) -> Columns:
    """Return the columns that a header names. Raises DataError if it is not clear which columns to use.

    where: the location of the header, for errors
    """
    names = _names(header)
    levels = _levels(names, where)
    raw_id, is_unnamed = _raw_id(names, levels, where)
    free = [column for column, name in enumerate(names)
            if column != raw_id and name not in RAW_ID + TEXT and not (column < raw_id and ROW_NUMBER.fullmatch(name))]
    levels = [column for column in levels if column in free]
    whole = [column for column in free if names[column] in WHOLE_ID]
    others = [column for column in free if column not in levels + whole]
    if levels and others:
        raise _unclear(where, "which columns have the codes", [header[column] for column in levels + others])
    if len(whole) > 1 and not levels:
        raise _unclear(where, "which column has the semantic IDs", [header[column] for column in whole])
    # A column with whole IDs repeats the codes of the levels.
    codes = levels or whole or others
    return Columns(raw_id, codes, [header[column] for column in others if column not in codes], len(header),
                   is_unnamed)


def _levels(names: list[str], where: str) -> list[int]:
    """Return the columns of the levels: those with the same name and different numbers, or without a name."""
    groups: dict[str, dict[int, int]] = {}  # name without the number -> number -> column
    for column, name in enumerate(names):
        if match := LEVEL.fullmatch(name):
            groups.setdefault(match[1], {})[int(match[2])] = column
        elif not name and column:
            groups.setdefault("", {})[100 + column] = column  # after the numbers, which have two digits
    several = [group for group in groups.values() if len(group) > 1]
    if len(several) > 1:
        raise _unclear(where, "which columns have the codes", [names[column] for group in several
                                                               for column in group.values()])
    if not several and not any(name in WHOLE_ID for name in names):  # an ID may have only one level
        several = [group for group in groups.values() if 0 not in group.values()][:1]
    return [group[number] for group in several for number in sorted(group)]


def _raw_id(names: list[str], levels: list[int], where: str) -> tuple[int, bool]:
    """Return the column of the raw ids, and whether it is a first column without a name."""
    for name in RAW_ID:
        if name in names:
            return names.index(name), False
    if not ROW_NUMBER.fullmatch(names[0]):
        return 0, False
    # The first column may have row numbers. Then another column has the raw ids.
    others = [column for column, name in enumerate(names)
              if column and column not in levels and name not in WHOLE_ID + TEXT]
    if not levels and not any(name in WHOLE_ID for name in names):  # the other columns may have codes
        others = [column for column in others if names[column].endswith("id")]
    if len(others) > 1:
        raise _unclear(where, "which column has the raw ids", [names[column] for column in others])
    return (others[0], False) if others else (0, True)


def _names(header: list[str]) -> list[str]:
    # RecBole adds types, such as item_id:token. pandas adds numbers, such as Unnamed: 0.
    return [name.strip().casefold().partition(":")[0] for name in header]


def _unclear(where: str, what: str, names: list[str]) -> DataError:
    return DataError(where, f"it is not clear {what}: {', '.join(map(repr, names))}", fix=FIX)
