"""Detect the real form of a raw file: its separator, its quotes, or a format that differs from its name."""

import json
import os
import re
import shlex
from contextlib import suppress
from itertools import islice
from pathlib import Path

from common.errors import DataError
from dataloader.readers import json_lines
from dataloader.readers.delimited import Layout, common_width, rows
from dataloader.readers.lines import (
    DAMAGED,
    NAMES,
    NO_RECORD,
    NOT_UTF8,
    PARSERS,
    encodable,
    first_format,
    is_gzip,
    numbered_lines,
    open_binary,
    parse_json,
)

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars", "::": "double colons",
              " ": "spaces"}
STRICT = (",", ";")  # in standard CSV files, a quote at the beginning of a field always opens a quoted value
HEAD = 1 << 16     # bytes at the beginning of a file that are compared with other formats
NUM_LINES = 20     # lines that must have the same number of columns
NUM_ROWS = 10_000  # rows that must be valid with other quotes
# First bytes of a file -> what the file is, and what to do. {stem} is its path without the extension {ending}; {bytes}
# is a command that prints its bytes, unpacked; {lines} is a command that prints its records as JSON lines.
RECODE = "convert the file with: {{bytes}} | iconv -f {} -t UTF-8 > {{stem}}-utf8{{ending}}"
UTF_16, UTF_32 = ((f"is encoded in {encoding}", RECODE.format(encoding)) for encoding in ("UTF-16", "UTF-32"))
BEGINNINGS = {b"PAR1": ("is a Parquet file", "rename it to {stem}.parquet"),
              b"PK\x03\x04": ("is a zip archive or an Excel file", "unpack it, or save the table as a CSV file"),
              b"\xd0\xcf\x11\xe0": ("is an Excel file", "save the table as a CSV file"),
              b"\xff\xfe\0\0": UTF_32, b"\0\0\xfe\xff": UTF_32, b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16}
PAGE = re.compile(r"\s*<(?:!doctype|html|head|\?xml|error)", re.IGNORECASE)
ARRAY = re.compile(r"\s*\[\s*\{")
NESTED = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*[\[{]')  # an object whose first value is an object or a list
TO_LINES = "convert it with: {lines} > {stem}-lines.jsonl"
PAIR = re.compile(rb"[\x80-\xff]{2}")


def separators(path: Path, usual: Layout) -> list[str]:
    """Return the separators with which the first rows of a file have the same number of columns, two or more.

    usual: the layout that the file probably has. If its separator is one of them, only this one is returned.
    """
    found = []
    for separator in dict.fromkeys((usual.delimiter, *SEPARATORS)):
        layout = usual._replace(delimiter=separator, lenient=separator not in STRICT)
        with suppress(DataError):  # the code that reads the whole file reports the error
            if common_width(path, layout, NUM_LINES) > 1:
                if separator == usual.delimiter:
                    return [separator]
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


def other_format(path: Path, format_: str, keys: tuple[str, ...] = ("item_id",)) -> DataError | None:
    """Return an error if a file is clearly not in the format of its name, else None.

    format_: "csv", "json" or "python"
    keys: names of columns for the conversion to JSON lines; if the file is an object with one record per key, the keys
        go into the first of these columns
    """
    what, fix = _other_format(path, format_, keys)
    return DataError(f"{path}:1", what, f"It begins with {_head(path)[:40]!r}",
                     _filled_in(fix, path, keys)) if what else None


def _other_format(path: Path, format_: str, keys: tuple[str, ...]) -> tuple[str, str]:
    """Return the real format and the fix, which may have placeholders in braces; ("", "") if the format is right."""
    head, lines = _head(path), first_lines(path)
    for beginning, found in BEGINNINGS.items():
        if head.startswith(beginning):
            return found
    if not lines:
        return "", ""
    if PAGE.match(lines[0]):
        return "is a page of HTML or XML", "get the data again; a server may have sent a page instead of the data"
    if ARRAY.match("\n".join(lines)):
        return "is one JSON array, but each line must have one record", TO_LINES
    if format_ == "csv":
        if not encodable(lines[0]):
            return NOT_UTF8, _recode(path) or "correct the line"
        if records := _record_format(lines[0]):
            return f"has {NAMES[records]} records instead of columns", "rename it to {stem}.jsonl"
        return "", ""
    valid = first_format(path)
    if valid == "" and not all(map(encodable, lines)) and (fix := _recode(path)):
        return NOT_UTF8, fix
    if what := _document(path, valid == "json", keys[0]):
        return what, TO_LINES
    if valid == "" and lines[0].lstrip()[0] not in "{[" and (found := separators(path, Layout("\n", lenient=True))):
        return (f"has no {NAMES[format_]} records, but {SEPARATORS[found[0]]} between columns",
                "rename it to {stem}" + (".tsv" if found == ["\t"] else ".csv"))
    return "", ""


def _document(path: Path, valid: bool, key: str) -> str:
    """Return what a JSON file has instead of one record per line, or "".

    valid: whether one of the first lines is a record
    """
    head, is_object = _head(path), "is one JSON object, but each line must have one record"
    text, end = head.decode("utf-8-sig", "replace").strip(), 0
    with suppress(*NO_RECORD, DataError):
        if valid:
            lines = list(islice(numbered_lines(path), 2))
            first = parse_json(lines[0][1]) if len(lines) == 1 else {}
        else:
            try:
                first, end = json.JSONDecoder().raw_decode(text)
            except ValueError:  # an object may be longer than the head
                return is_object if len(head) == HEAD and NESTED.match(text) else ""
        if not text[end:] or valid:
            has_records = next(json_lines.records(first, key), first) is not first
            if has_records and "." not in key and not isinstance(first.get(key), str | int | float):
                return is_object
        if not valid and isinstance(first, dict):
            return "has several records per line, or records that span several lines"
    return ""


def not_utf8_fix(path: Path) -> str:
    """Return what to do about a file with lines that are not UTF-8, or "" if most of its texts are UTF-8."""
    return _filled_in(_recode(path), path, ())


def _recode(path: Path) -> str:
    num_valid, num_invalid, num_pairs, encoding = 0, 0, 0, "CP1252"
    for _number, line in numbered_lines(path):
        if not line.isascii():
            try:
                line.decode()
                num_valid += 1
            except UnicodeDecodeError:
                num_invalid += 1
                num_pairs += PAIR.search(line) is not None
                with suppress(UnicodeDecodeError):
                    line.decode(encoding)
                    continue
                encoding = "ISO-8859-1"  # every byte is valid in this encoding
    if num_valid >= num_invalid:
        return ""
    # In Western European texts, two letters with accents rarely follow each other.
    if 2 * num_pairs <= num_invalid:
        return RECODE.format(encoding)
    return RECODE.replace("with", "from its encoding; for GB18030, the command is").format("GB18030")


def _filled_in(fix: str, path: Path, keys: tuple[str, ...]) -> str:
    """Fill in the names in braces in a fix."""
    named = path.name.removesuffix(".gz")
    ending, file = Path(named).suffix, shlex.quote(str(path))
    stem = str(path.with_name(named.removesuffix(ending)))
    convert = ["python", os.path.relpath(json_lines.__file__), str(path), *keys]
    return fix.format(stem=shlex.quote(stem), ending=shlex.quote(ending), lines=shlex.join(convert),
                      bytes=f"{'gzip -dc' if is_gzip(path) else 'cat'} {file}")


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
