"""Detect the real form of a raw file: its separator, its quotes, or a format that differs from its name."""

import re
import shlex
from contextlib import suppress
from itertools import islice
from pathlib import Path

from common.errors import DataError
from dataloader.readers.delimited import Layout, fields_of, rows
from dataloader.readers.lines import DAMAGED, NAMES, NO_RECORD, PARSERS, first_format, is_gzip, open_binary

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars", "::": "double colons",
              " ": "spaces"}
HEAD = 1 << 16     # bytes at the beginning of a file that are compared with other formats
NUM_LINES = 20     # lines that must have the same number of columns
NUM_ROWS = 10_000  # rows that must be valid with other quotes
# First bytes of a file -> what the file is, and what to do. {file} is the file; {stem} is its path without extension.
UTF_16 = ("is encoded in UTF-16", "convert it with: iconv -f UTF-16 -t UTF-8 {file} > {stem}-utf8{ending}")
BEGINNINGS = {b"PAR1": ("is a Parquet file", "rename it to {stem}.parquet"),
              b"PK\x03\x04": ("is a zip archive or an Excel file", "unpack it, or save the table as a CSV file"),
              b"\xd0\xcf\x11\xe0": ("is an Excel file", "save the table as a CSV file"),
              b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16}
PAGE = re.compile(r"\s*<(?:!doctype|html|head|\?xml|error)", re.IGNORECASE)
ARRAY = re.compile(r"\s*\[\s*\{")
ONE_PER_LINE = "import json, sys; [print(json.dumps(record)) for record in json.load(sys.stdin)]"


def separators(path: Path, usual: str) -> list[str]:
    """Return the separators with which the first lines of a file have the same number of columns, two or more.

    If `usual` is one of them, only `usual` is returned.
    """
    lines, found = first_lines(path), []
    for separator in dict.fromkeys((usual, *SEPARATORS)):
        layout = Layout(separator, lenient=True)
        widths = [len(line.split()) if separator == " " else len(fields_of(line, layout)) for line in lines]
        if len(set(widths)) == 1 and widths[0] > 1:
            if separator == usual:
                return [usual]
            found.append(separator)
    return [separator for separator in found if separator != " "] or found  # a text between tabs can have spaces


def first_lines(path: Path) -> list[str]:
    """Return the first lines of a file that are not blank."""
    head = _head(path)
    lines = re.split("\r\n|\n|\r", head.decode("utf-8-sig", "surrogateescape"))
    whole = lines[:-1] if len(head) == HEAD and len(lines) > 1 else lines  # the last line may be cut
    return [line for line in whole if line.strip()][:NUM_LINES]


def _head(path: Path) -> bytes:
    with suppress(*DAMAGED), open_binary(path) as file:  # the code that reads the whole file reports the error
        return file.read(HEAD)
    return b""


def other_format(path: Path, format_: str) -> DataError | None:
    """Return an error if a file is clearly not in the format of its name, else None.

    format_: "csv", "json" or "python"
    """
    head, lines, what = _head(path), first_lines(path), ""
    named = path.name.removesuffix(".gz")
    ending = Path(named).suffix
    for beginning, found in BEGINNINGS.items():
        if head.startswith(beginning):
            what, fix = found
    if not what and lines and PAGE.match(lines[0]):
        what, fix = "is a page of HTML or XML", "get the data again; a server may have sent a page instead of the data"
    if not what and ARRAY.match("\n".join(lines)):
        what = "is one JSON array, but each line must have one record"
        fix = (f"convert it with: {'gzip -dc' if is_gzip(path) else 'cat'} {{file}} | python -c '{ONE_PER_LINE}' > "
               "{stem}-lines.jsonl")
    if not what and lines and format_ == "csv":
        if records := _record_format(lines[0]):
            what, fix = f"has {NAMES[records]} records instead of columns", "rename it to {stem}.jsonl"
    elif not what and lines and first_format(path) == "":
        what = f"has no {NAMES[format_]} records"
        if lines[0].strip() == "{":
            what, fix = "has records of several lines", "convert it with: jq -c . {file} > {stem}-lines.jsonl"
        elif found := separators(path, "\n"):
            what += f", but {SEPARATORS[found[0]]} between columns"
            fix = "rename it to {stem}" + (".tsv" if found == ["\t"] else ".csv")
        else:
            return None
    if not what:
        return None
    names = {"file": path, "stem": path.with_name(named.removesuffix(ending)), "ending": ending}
    return DataError(f"{path}:1", what, f"It begins with {head[:40]!r}", fix.format(
        **{name: shlex.quote(str(value)) for name, value in names.items()}))


def _record_format(line: str) -> str:
    """Return the format of a line, "json" or "python", or "" if the line is not a record."""
    for name, parse in PARSERS.items():
        with suppress(*NO_RECORD):
            parse(line.encode("utf-8", "surrogateescape"))
            return name
    return ""


def quoting_flag(path: Path, layout: Layout, most: bool) -> str:
    """Return a flag for quotes that makes the first rows of a file valid.

    Returns "" if no flag makes them valid, or if they are already valid.

    most: whether at least half of the rows are invalid. If not, only --escape is tried, because it does not change the
        other rows.
    """
    others = {"--escape '\\'": layout._replace(escape="\\")} if layout.quote and not layout.escape else {}
    if layout.quote and most:
        others["--quoting double"] = layout._replace(lenient=False)
        others["--quoting none"] = layout._replace(quote="", escape="")
    if _all_valid(path, layout):
        return ""
    return next((flag for flag, other in others.items() if other != layout and _all_valid(path, other)), "")


def _all_valid(path: Path, layout: Layout) -> bool:
    return all(isinstance(values, dict) for _line, values, _text in islice(rows(path, layout), NUM_ROWS))
