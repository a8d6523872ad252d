"""Read files of delimited values (CSV, TSV and similar), with DuckDB or row by row."""

import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.tables import sql_path, text
from dataloader.readers.lines import (
    DAMAGED,
    MAX_LINE,
    NOT_UTF8,
    blocks,
    compression,
    damaged,
    encodable,
    open_binary,
)

BUFFER = 2 * MAX_LINE  # bytes that DuckDB reads at once; DuckDB's default is 16 * MAX_LINE
MAX_REST = 1 << 20     # bytes at the end of a block that may belong to a row of several lines
LINE_BREAK = re.compile("[\r\n]")


class Layout(NamedTuple):
    """The delimiter, the quotes and the header of a file."""

    delimiter: str = ","
    quote: str = '"'                       # "" if no value is quoted
    header: tuple[str, ...] | None = None  # column names, if the file does not have a header
    typed: bool = False                    # whether the header gives the type of each column, such as `user_id:token`
    escape: str = ""                       # the character before a quote in a quoted value; "": such quotes are doubled
    # Whether a quote is text unless it encloses a whole field. TSV files of many programs have such quotes. If false, a
    # quote at the start of a field always opens a quoted value, as the standard for CSV files says.
    lenient: bool = False


def header(path: Path, layout: Layout, origin: str = "") -> list[str]:
    """Return the column names of a file, from its layout or its first line, without blanks around them.

    `origin` is the file name for messages. Raises DataError if the first line does not contain column names.
    """
    return list(layout.header) if layout.header is not None else [
        (name.split(":")[0] if layout.typed else name).strip() for name in first_row(path, layout, origin)]


def first_row(path: Path, layout: Layout, origin: str = "") -> list[str]:
    """Return the fields of the first row of a file. Raises DataError if the row is blank or cannot be read."""
    _line, fields, _text = next(_rows(path, layout, None), (1, [""], ""))
    fault = fields if isinstance(fields, str) else "" if any(map(str.strip, fields)) else "is blank"
    if fault:
        raise DataError(f"{origin or path}:1", fault, "The first line determines the columns", "correct the line")
    return list(fields)


def common_width(path: Path, layout: Layout, num_rows: int) -> int:
    """Return the number of columns of a file, or 0 if one of its first rows is invalid or has another number."""
    first = next((values for _line, values, whole in _rows(path, layout, None) if whole.strip()), "")
    rows = (values for _line, values, whole in _rows(path, layout, len(first)) if whole.strip() and values != NOT_UTF8)
    fits = all(not isinstance(values, str) and _fits(values, len(first)) for values in islice(rows, num_rows))
    return len(first) if fits and not isinstance(first, str) else 0


def reader(path: Path, layout: Layout, columns: list[str]) -> str:
    """Return SQL that reads the rows of a file.

    The columns are called `c0`, `c1`, …, because DuckDB cannot distinguish column names that differ only in case.
    """
    listed = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(columns)))
    return (f"read_csv({sql_path(path)}, hive_partitioning = false, columns = {{{listed}}}, "
            f"header = {layout.header is None}, delim = {text(layout.delimiter)}, quote = {text(layout.quote)}, "
            f"escape = {text(layout.escape or layout.quote)}, auto_detect = false, {compression(path)}, "
            f"max_line_size = {MAX_LINE}, buffer_size = {BUFFER})")


def suits_duckdb(path: Path, layout: Layout) -> bool:
    """Return whether DuckDB and `rows` read the quotes and the long lines of a file in the same way.

    DuckDB drops a last line that is longer than its buffer. DuckDB reads quotes as the CSV standard says.
    A quote that is text in a lenient layout could therefore swallow the following lines.

    The whole file is read, so its checksum is compared as well. Raises DataError if the file is damaged.
    """
    checks_quotes, rest = bool(layout.quote and (layout.lenient or layout.escape)), b""
    quote, plain = layout.quote.encode(), _patterns(layout).plain
    for block in blocks(path):
        if len(block) > MAX_LINE and block.find(b"\n", 0, MAX_LINE + 1) < 0:
            return False
        if checks_quotes and (rest or quote in block):
            rest += block
            rest = rest[plain.match(rest).end():]
            if len(rest) > MAX_REST:
                return False
    return not rest or plain.fullmatch(rest + b"\n") is not None


def rows(path: Path, layout: Layout) -> Iterator[tuple[int, dict[str, str] | str, str]]:
    """Yield (line number, values, text) for every row that is not blank, except the header.

    A row can span several lines; the line number is that of the first line. `values` is a dict (column -> value), or
    the reason why the row is invalid (a string).
    """
    names = header(path, layout)
    for number, (line, values, whole) in enumerate(_rows(path, layout, len(names))):
        blank = len(values) < 2 and not "".join(values).strip()  # a row of delimiters is not blank
        if blank or (number == 0 and layout.header is None):
            continue
        if not isinstance(values, str):
            values = dict(zip(names, values, strict=False)) if _fits(values, len(names)) else (
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


class _Lines:
    """The lines of a text file. Lines that were read too far ahead can be given back."""

    def __init__(self, file: io.TextIOWrapper):
        self.file, self.returned = file, deque[str]()

    def read(self) -> str:
        """Return the next line with its line end, or "" at the end of the file. A line that is too long is cut."""
        if self.returned:
            return self.returned.popleft()
        line = self.file.readline(MAX_LINE)
        if len(line) == MAX_LINE and not line.endswith(("\r", "\n")):
            while (more := self.file.readline(MAX_LINE)) and not more.endswith(("\r", "\n")):
                pass
        return line

    def give_back(self, lines: list[str]) -> None:
        self.returned.extendleft(reversed(lines))


def _rows(path: Path, layout: Layout, width: int | None) -> Iterator[tuple[int, list[str] | str, str]]:
    """Yield (line number, values, text) for every row, including the header and blank rows.

    `values` is a list of strings, or the reason why the row is invalid (a string). `width` is the number of columns, or
    None if it is not known yet.
    """
    quoted_row, number = _lenient_row if layout.lenient else _strict_row, 1
    try:
        with open_binary(path) as packed:
            lines = _Lines(io.TextIOWrapper(packed, encoding="utf-8-sig", errors="surrogateescape", newline=""))
            while line := lines.read():
                taken, values = [line], f"is longer than {MAX_LINE:,} characters"
                if len(line) < MAX_LINE:
                    if layout.quote and layout.quote in line:
                        values = quoted_row(taken, lines, layout, width)
                    else:
                        values = line.rstrip("\r\n").split(layout.delimiter)
                    if layout.delimiter == " " and (width is None or not _fits(values, width)):
                        values = list(filter(None, values))  # several spaces align the columns
                whole = "".join(taken).rstrip("\r\n")
                if not whole.isascii() and not encodable(whole):
                    values = NOT_UTF8
                yield number, values, whole
                number += len(taken)
    except DAMAGED as error:
        raise damaged(path, error) from error


def _strict_row(taken: list[str], lines: _Lines, layout: Layout, width: int | None) -> list[str] | str:
    """Return the values of a row with quotes, or the reason why it is invalid.

    taken: the first line of the row; the other lines of the row are appended
    """
    try:
        values, opened = _split(taken[0], layout)
        while opened is not None:
            if not _take_value(taken, lines, layout, lambda _line, _inside: False):
                raise ValueError(f"has a quote that is not closed within {MAX_LINE:,} characters")
            values, opened = _split("".join(taken), layout)
    except ValueError as error:
        lines.give_back(taken[1:])
        del taken[1:]
        return str(error)
    return values


def _lenient_row(taken: list[str], lines: _Lines, layout: Layout, width: int | None) -> list[str]:
    """Return the values of a row with quotes, in a lenient layout.

    taken: the first line of the row; the other lines of the row are appended
    """
    def is_row(line: str, inside: str) -> bool:
        """Return whether a line is a row of its own, and therefore not a part of the quoted value.

        inside: the part of the line that would be in quotes

        The last line of a value without delimiters is not a row, although it can have the right number of fields.
        """
        nonlocal delimited
        delimited = delimited or layout.delimiter in inside
        return (delimited or width == 1) and (width is None or _fits(fields_of(line, layout), width))

    values, opened = _split(taken[0], layout)
    num_lines, delimited = 1, opened is not None and layout.delimiter in taken[0][opened:]
    while opened is not None and _take_value(taken, lines, layout, is_row):
        joined, opened = _split("".join(taken), layout)
        if joined and (width is None or _fits(joined, width)):
            values, num_lines = joined, len(taken)
    lines.give_back(taken[num_lines:])
    del taken[num_lines:]
    if width is not None and not _fits(values, width):
        plain = taken[0].rstrip("\r\n").split(layout.delimiter)
        return plain if _fits(plain, width) else values
    return values


def _take_value(taken: list[str], lines: _Lines, layout: Layout, is_row: Callable[[str, str], bool]) -> bool:
    """Append the lines of a quoted value to `taken`, and return whether its closing quote was found.

    is_row: called with each line and the part of the line that would be in quotes; if true, the search ends
    """
    size, closing = sum(map(len, taken)), _patterns(layout).closing
    while size <= MAX_LINE and (line := lines.read()):
        taken.append(line)
        size += len(line)
        found = closing.match(line)
        if is_row(line, found[0] if found else line):
            return False
        if found:
            return True
    return False


def _fits(values: list[str], width: int) -> bool:
    return len(values) >= width and not any(values[width:])  # as for DuckDB, a row may end with delimiters


class Patterns(NamedTuple):
    """Regular expressions for the quotes of a layout."""

    value: re.Pattern[str]    # a quoted value; group 1 is its content
    opened: re.Pattern[str]   # a quoted value that is not closed
    closing: re.Pattern[str]  # the rest of a quoted value, from the start of a line
    escaped: re.Pattern[str]  # an escape in a quoted value; group 1 is the escaped character
    plain: re.Pattern[bytes]  # rows that DuckDB and `rows` read in the same way


@cache
def _patterns(layout: Layout) -> Patterns:
    quote, end, escape = (re.escape(part) for part in (layout.quote or '"', layout.delimiter, layout.escape))
    # `(?>(...)*)` and not `(...)*+`, see `lines.STRING`.
    inside = f"(?>(?:[^{quote}{escape}]++|{f'{escape}.' if escape else quote * 2})*)"

    def value(excluded: str) -> str:
        """Return a pattern for quoted values that DuckDB and `rows` read in the same way.

        The values do not contain the characters in `excluded`.
        """
        known = f"{escape}[{quote}{escape}]" if escape else quote * 2  # DuckDB drops the escape before other characters
        return f"{quote}(?>(?:[^{quote}{escape}{excluded}]++|{known})*){quote}"

    # In a lenient layout, the pattern allows only quoted values that are on one line or have no delimiter. For other
    # values, `rows` must check whether they would swallow lines. The pattern does not allow spaces around quotes,
    # because DuckDB ignores them.
    one = len(layout.delimiter.encode()) == 1
    unquoted = f"[^{end}\r\n]*+" if one else f"(?>(?:(?!{end})[^\r\n])*)"
    values = [value(end), value("\r\n")] if layout.lenient and one else [value("\r\n" if layout.lenient else "")]
    return Patterns(re.compile(f"{quote}({inside}){quote}(?={end}|[\r\n]*\\Z)", re.DOTALL),
                    re.compile(f"{quote}{inside}{escape and f'{escape}?'}\\Z", re.DOTALL),
                    re.compile(f"{inside}{quote}", re.DOTALL),
                    re.compile(f"{escape or quote}([{quote}{escape}])"),
                    re.compile(f"(?>(?:(?:{'|'.join(values)}|(?! *{quote}){unquoted})(?:{end}|\r?\n|\r))*)".encode()))


def fields_of(line: str, layout: Layout) -> list[str]:
    """Return the fields of a line in a lenient layout."""
    return _split(line, layout)[0]


def _split(text_: str, layout: Layout) -> tuple[list[str], int | None]:
    """Return the values of a row, and the position of the first quote whose value is not closed in this text, or None.

    The text can have several lines. In a lenient layout, a quote that does not enclose a whole field is text; if such a
    field has several lines, no values are returned. In another layout, such a quote raises ValueError.
    """
    patterns, row, quote = _patterns(layout), text_.rstrip("\r\n"), layout.quote
    values: list[str] = []
    opened, start, end = None, 0, -1
    while end < len(row):
        found = patterns.value.match(row, start) if row.startswith(quote, start) else None
        if found:
            values.append(patterns.escaped.sub(r"\1", found[1]))
            end = found.end()
        else:
            end = row.find(layout.delimiter, start)
            end = len(row) if end < 0 else end
            value = row[start:end]
            if value.startswith(quote) and opened is None and patterns.opened.match(row, start):
                opened = start
            if not layout.lenient:
                if opened is not None:
                    break
                if value.lstrip(" ").startswith(quote):  # DuckDB ignores the spaces
                    raise ValueError(f"has {'text after a closing' if value[0] == quote else 'a space before a'} quote")
            elif LINE_BREAK.search(value):
                return [], None
            values.append(value)
        start = end + len(layout.delimiter)
    return values, opened
