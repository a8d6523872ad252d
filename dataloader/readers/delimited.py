"""Read files of delimited values (CSV, TSV and similar), with DuckDB or row by row."""

import csv
import io
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.tables import sql_path
from dataloader.readers.lines import DAMAGED, MAX_LINE, damaged, encodable, open_binary
from dataloader.workspace import text

BUFFER = 2 * MAX_LINE  # bytes that DuckDB reads at once; DuckDB's default is 16 * MAX_LINE
INSTEAD = "\x1f"       # replaces a delimiter of several characters; the csv module accepts only a single character


class Layout(NamedTuple):
    """The delimiter, quote character and header of a file."""

    delimiter: str = ","
    quote: str = '"'
    header: tuple[str, ...] | None = None  # column names, if the file does not have a header
    typed: bool = False                    # whether the header gives the type of each column, such as `user_id:token`


def header(path: Path, layout: Layout, origin: str = "") -> list[str]:
    """Return the column names of a file, from its layout or its first line.

    `origin` is the file name for messages. Raises DataError if the first line does not contain column names.
    """
    if layout.header is not None:
        return list(layout.header)
    _line, names, line = next(_rows(path, layout), (1, [""], ""))
    start = line[:2].encode("utf-8", "surrogateescape")
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{origin or path}:1", "is encoded in UTF-16", f"It begins with {start!r}",
                        "save the file as UTF-8")
    fault = names if isinstance(names, str) else "" if any(map(str.strip, names)) else "is blank"
    if fault:
        raise DataError(f"{origin or path}:1", fault, "The first line must contain the column names",
                        "correct the line")
    return [name.split(":")[0] for name in names] if layout.typed else names


def reader(path: Path, layout: Layout, columns: list[str]) -> str:
    """Return SQL that reads the rows of a file.

    The columns are called `c0`, `c1`, …, because DuckDB cannot distinguish column names that differ only in case.
    """
    listed = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(columns)))
    return (f"read_csv({sql_path(path)}, hive_partitioning = false, columns = {{{listed}}}, "
            f"header = {layout.header is None}, delim = {text(layout.delimiter)}, quote = {text(layout.quote)}, "
            f"escape = {text(layout.quote)}, auto_detect = false, "
            f"compression = {text('gzip' if path.suffix == '.gz' else 'none')}, max_line_size = {MAX_LINE}, "
            f"buffer_size = {BUFFER})")


def rows(path: Path, layout: Layout) -> Iterator[tuple[int, dict[str, str] | str, str]]:
    """Yield (line number, values, text) for every row that is not blank, except the header.

    A row can span several lines; the line number is that of the first line. `values` is a dict (column -> value), or
    the reason why the row is invalid (a string).
    """
    names = header(path, layout)
    for number, (line, values, whole) in enumerate(_rows(path, layout)):
        blank = len(values) < 2 and not "".join(values).strip()  # a row of delimiters is not blank
        if blank or (number == 0 and layout.header is None):
            continue
        if not isinstance(values, str):
            if len(values) == len(names) + 1 and not values[-1]:
                values = values[:-1]  # the row ends with a delimiter
            values = dict(zip(names, values, strict=True)) if len(values) == len(names) else (
                f"must have {len(names)} fields, got {len(values)}")
        yield line, values, whole


def rewrite(path: Path, layout: Layout, wanted: list[str], target: Path) -> None:
    """Write the columns `wanted` of a file to `target`, as JSON lines.

    An invalid row becomes `{}`.
    """
    with target.open("w", encoding="utf-8") as out:
        for _line, values, _text in rows(path, layout):
            kept = {} if isinstance(values, str) else {c: values[c] for c in wanted if values.get(c)}
            out.write(json.dumps(kept, ensure_ascii=False) + "\n")


def _rows(path: Path, layout: Layout) -> Iterator[tuple[int, list[str] | str, str]]:
    """Yield (line number, values, text) for every row, including the header and blank rows.

    `values` is a list of strings, or the reason why the row is invalid (a string).
    """
    csv.field_size_limit(MAX_LINE)  # a global setting of the csv module
    quoting = {"quotechar": layout.quote, "strict": True} if layout.quote else {"quoting": csv.QUOTE_NONE}
    delimiter = layout.delimiter if len(layout.delimiter) == 1 else INSTEAD
    # `taken`: the lines of the current row; `back`: lines to parse again before the next line of the file;
    # `number`: the number of the row's first line.
    taken, back, number = [], deque(), 1

    def lines(file: io.TextIOWrapper) -> Iterator[str]:
        while line := back.popleft() if back else file.readline(MAX_LINE):
            taken.append(line)
            if len(line) >= MAX_LINE:
                while (more := file.readline(MAX_LINE)) and not more.endswith(("\n", "\r")):
                    pass
                raise csv.Error(f"the line is longer than {MAX_LINE:,} characters")
            yield line if delimiter == layout.delimiter else line.replace(layout.delimiter, delimiter)

    try:
        with open_binary(path) as packed:
            file = io.TextIOWrapper(packed, encoding="utf-8-sig", errors="surrogateescape", newline="")
            parsed = csv.reader(lines(file), delimiter=delimiter, **quoting)
            while True:
                try:
                    values = next(parsed, None)
                except csv.Error as error:
                    values = f"cannot be parsed ({error})"
                    # If a quote is never closed, the parser reads later rows as a part of this row. Parse the later
                    # rows again.
                    back.extendleft(reversed(taken[1:]))
                    del taken[1:]
                    parsed = csv.reader(lines(file), delimiter=delimiter, **quoting)
                if values is None:
                    return
                whole = "".join(taken).rstrip("\r\n")
                if not whole.isascii() and not encodable(whole):
                    values = "is not UTF-8"
                # In DuckDB, a quote after a space begins a quoted value; in the csv module, it does not.
                elif layout.quote and f" {layout.quote}" in whole and not isinstance(values, str) and any(
                        value[:1] == " " and value.lstrip(" ")[:1] == layout.quote for value in values):
                    values = "has a space before a quote"
                yield number, values, whole
                number += len(taken)
                taken.clear()
    except DAMAGED as error:
        raise damaged(path, error) from error
