"""Read semantic IDs from files of other programs: JSON (index.json of LC-Rec, LETTER, MiniOneRec) and CSV."""

import csv
import logging
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.reading import DuplicateKey, parse_json, shortened
from quantization.id_columns import FIX, Columns, find_columns, is_header

log = logging.getLogger(__name__)

# A code is an integer or a token that ends in an integer, such as <a_12>, <s_a_12> or <|C1-12|>.
CODE = re.compile(r"<(?P<bar>\|?)(?P<name>\w*[^\W\d]|\w*[^\W_][-:])?(?P<token>[0-9]{1,9})(?P=bar)>"
                  r"|(?P<number>[0-9]{1,9})")
MARKER = re.compile(r"<\|?\w*(begin|start|end|bos|eos)\|?>", re.IGNORECASE)  # such as <|sid_begin|>
SEPARATOR = re.compile(r"\s*[,;]\s*|\s+|(?<=>)(?=<)")


def read_codes(path: Path) -> dict[str, list[int]]:
    """Read semantic IDs from a .json or .csv file, and return a dict that maps each raw id to its codes.

    All IDs in the result have the same number of codes. If some IDs in the file have one more code, which only tells
    apart items whose other codes are equal, then this code is left out.

    Raises DataError if the file is invalid. The error message names the invalid entry or line.
    """
    codes: dict[str, list[int]] = {}
    first_with: dict[int, str] = {}  # number of codes -> location of the first entry with this number
    names: dict[int, str] = {}       # level -> name of its tokens; integers have no name
    entries, fix = (_read_json(path), "correct the entry") if path.suffix == ".json" else (
        _read_csv(path), "correct the line; if a column has no codes, remove it, or rename the column of the raw ids "
        "to item_id")
    for where, raw_id, value in entries:
        found = _parse(value)
        if not found:
            raise DataError(where, f"{repr(value)[:200]} is not a semantic ID", "Expected integers from 0 to "
                            "999999999, or tokens that end in such an integer, for example <a_12>", fix)
        if raw_id in codes:
            raise _duplicate(where, raw_id)
        codes[raw_id] = [code.number for code in found]
        for level, name in enumerate(code.name for code in found):
            if name and names.setdefault(level, name) != name:
                raise DataError(where, f"the token of level {level + 1} has the name {name!r}", f"Earlier entries have "
                                f"{names[level]!r} in this level", "write all tokens in the order of the levels")
        first_with.setdefault(len(found), where)
    if not codes:
        raise DataError(path, "has no entries", fix="use a file that contains semantic IDs")
    return codes if len(first_with) == 1 else _cut(path, codes, first_with)


class Code(NamedTuple):
    name: str  # such as a_ in the token <a_12>; "" for an integer
    number: int


def parse(value: list) -> list[int] | None:
    """Return the codes of a semantic ID, or None if the value is not a semantic ID. The list of codes may be empty.

    value: a list with one integer or token per level, or a list with one text, such as "1,2,3" or
        "<|sid_begin|><s_a_1><s_b_2><|sid_end|>"
    """
    codes = _parse(value)
    return None if codes is None else [code.number for code in codes]


def _parse(value: list) -> list[Code] | None:
    words = _words(value[0]) if len(value) == 1 and isinstance(value[0], str) else value
    codes = [_code(word) for word in words]
    if None in codes:
        first, last = (isinstance(word, str) and MARKER.fullmatch(word.strip()) for word in (words[0], words[-1]))
        codes = codes[1 if first else 0:-1 if last else None]
    valid = [code for code in codes if code is not None]
    return valid if len(valid) == len(codes) else None


def _words(text: str) -> list[str]:
    """Split a text into its words. The text may also be a Python list, as pandas writes it into a cell."""
    text = text.strip()
    is_list = text[:1] + text[-1:] in ("[]", "()")
    words = SEPARATOR.split(text[1:-1].strip() if is_list else text)
    return [word[1:-1] if is_list and word[:1] == word[-1:] and word[:1] in ("'", '"') else word for word in words]


def _code(word: object) -> Code | None:
    if isinstance(word, str):
        return _code_of_text(word)
    return Code("", word) if type(word) is int and 0 <= word <= 999_999_999 else None


@lru_cache(maxsize=100_000)  # most tokens occur in many IDs
def _code_of_text(word: str) -> Code | None:
    match = CODE.fullmatch(word.strip())
    return Code(match["name"] or "", int(match["token"] or match["number"])) if match else None


def _cut(path: Path, codes: dict[str, list[int]], first_with: dict[int, str]) -> dict[str, list[int]]:
    """Remove the last code of each ID that has one code more than the other IDs, and return all codes.

    Raises DataError unless the last codes only tell items apart: each of these IDs shares its other codes with another
    item, and no two of them are equal.
    """
    first, second, *more = first_with  # in the order of the file
    short, long = sorted((first, second))
    fix = "give all items the same number of codes"
    if more or long > short + 1:
        raise DataError(first_with[second], f"has {second} codes", f"All earlier entries have {first} codes", fix)
    num_with, seen = Counter(tuple(row[:short]) for row in codes.values()), set()
    for raw_id, row in codes.items():
        if len(row) == long:
            why = (f"Another item has the same {long} codes" if tuple(row) in seen else
                   f"No other item has the same first {short} codes" if num_with[tuple(row[:short])] == 1 else "")
            if why:
                raise DataError(f"{path}: {raw_id!r}", f"has {long} codes, but other items have {short}",
                                f"{why}, so the last code does not only tell apart items whose other codes are equal",
                                fix)
            seen.add(tuple(row))
    log.warning("quantization: %s: left out the last code of the %d of %d entries with %d codes, because this code "
                "only tells apart items with the same first %d codes", path, len(seen), len(codes), long, short)
    return {raw_id: row[:short] for raw_id, row in codes.items()}


def _duplicate(where: str, raw_id: str) -> DataError:
    return DataError(where, f"duplicate item {raw_id!r}", fix="remove one of the two entries")


def _read_json(path: Path) -> Iterator[tuple[str, str, list]]:
    """For each entry of a JSON object, yield its location (for error messages), the raw id and the semantic ID."""
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"))
    except DuplicateKey as error:
        raise _duplicate(f"{path}: {error.key!r}", error.key) from error
    except ValueError as error:
        raise DataError(path, "is not valid JSON", shortened(str(error)), "use a valid index.json in UTF-8") from error
    if not isinstance(entries, dict):
        raise DataError(path, "is not a JSON object", 'Expected {"<raw id>": ["<a_12>", "<b_3>", ...], ...}',
                        "use a valid index.json")
    for raw_id, value in entries.items():
        yield f"{path}: {raw_id!r}", raw_id, value if isinstance(value, list) else [value]


def _read_csv(path: Path) -> Iterator[tuple[str, str, list]]:
    """For each line of a CSV file, yield its location (for error messages), the raw id and the cells with codes.

    The first line is a header if it names a column of raw ids, or if no cell after its first cell is a semantic ID.
    Without a header, the first column has the raw ids. Empty cells at the end of a line are left out.
    """
    columns: Columns | None = None
    raw_ids: list[str] = []
    for number, row in _csv_rows(path):
        where = f"{path}:{number}"
        if not any(row):
            continue
        if columns is None and (is_header(row) or not any(parse([cell]) for cell in row[1:])):
            columns = find_columns(row, where)
            continue
        columns = columns or Columns(0, [], [], width=1)
        if len(row) <= columns.raw_id:
            raise DataError(where, "has no raw id", f"The raw id is in column {columns.raw_id + 1}, but the "
                            f"line has {len(row)} columns", "correct the line")
        cells = [row[column] for column in columns.codes if column < len(row)] + row[columns.width:]
        while cells and not cells[-1].strip():
            cells.pop()
        raw_ids.append(row[columns.raw_id])
        yield where, raw_ids[-1], cells
    if columns and columns.is_unnamed and _are_row_numbers(raw_ids):
        raise DataError(f"{path}:1", "names no column of raw ids, and the first column has row numbers", fix=FIX)
    if columns and columns.ignored:
        log.warning("quantization: %s: ignored the columns %s", path, ", ".join(map(repr, columns.ignored)))


def _are_row_numbers(raw_ids: list[str]) -> bool:
    """Return whether the ids count the rows from 0, as pandas does, or from 1, as R does."""
    return len(raw_ids) > 1 and any(raw_ids == [str(start + row) for row in range(len(raw_ids))] for start in (0, 1))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each row of a CSV file with the number of its first line.

    The columns are separated by commas or, if the first line has no comma, by semicolons or tabs.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            delimiter = next((delimiter for delimiter in ",;\t" if delimiter in first), ",")
            file.seek(0)
            reader, number = csv.reader(file, delimiter=delimiter), 1
            for row in reader:
                yield number, row
                number = reader.line_num + 1
    except (ValueError, csv.Error) as error:
        raise DataError(path, "is not a valid CSV file", str(error),
                        "save it in UTF-8, with commas between the columns") from error
