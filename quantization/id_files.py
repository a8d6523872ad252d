"""Read semantic IDs from files of other programs: JSON (index.json of LC-Rec, LETTER, MiniOneRec) and CSV."""

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

from common.errors import DataError

log = logging.getLogger(__name__)

# A code is an integer or a token that ends in an integer, such as <a_12>, <s_a_12> or <|C1-12|>.
CODE = re.compile(r"<(?P<bar>\|?)(?:\w*[^\W\d]|\w*[^\W_][-:])?(?P<token>[0-9]{1,9})(?P=bar)>|(?P<number>[0-9]{1,9})")
MARKER = re.compile(r"<\|?\w*(begin|start|end|bos|eos)\|?>", re.IGNORECASE)  # such as <|sid_begin|>
SEPARATOR = re.compile(r"\s*[,;]\s*|\s+|(?<=>)(?=<)")

# Names of CSV columns, in lower case
RAW_ID = ("raw_id", "item_id", "item", "id")  # names of the column of raw ids, in order of priority
ROW_NUMBER = re.compile(r"(unnamed|index)?")           # pandas gives these names to its row numbers
WHOLE_ID = ("semantic_id", "semantic_ids", "sem_id", "sem_ids", "sid", "sids")
TEXT = ("title", "text", "description")


def read_codes(path: Path) -> dict[str, list[int]]:
    """Read semantic IDs from a .json or .csv file, and return a dict that maps each raw id to its codes.

    All IDs in the result have the same number of codes. If some IDs in the file have one more code, which only tells
    apart items with the same other codes, then this code is left out.

    Raises DataError if the file is invalid. The error message names the invalid entry or line.
    """
    codes: dict[str, list[int]] = {}
    first_with: dict[int, str] = {}  # number of codes -> location of the first entry with this number
    entries, fix = (_read_json(path), "correct the entry") if path.suffix == ".json" else (
        _read_csv(path), "correct the line; if a column has no codes, remove it, or name the raw ids item_id")
    for where, raw_id, value in entries:
        found = parse(value)
        if not found:
            raise DataError(where, f"{repr(value)[:200]} is not a semantic ID", "Expected integers from 0 to "
                            "999999999, or tokens that end in such an integer, for example <a_12>", fix)
        if raw_id in codes:
            raise _duplicate(where, raw_id)
        codes[raw_id] = found
        first_with.setdefault(len(found), where)
    if not codes:
        raise DataError(path, "has no entries", fix="use a file that contains semantic IDs")
    return codes if len(first_with) == 1 else _cut(path, codes, first_with)


def parse(value: list) -> list | None:
    """Return the codes of a semantic ID, or None if the value is not a semantic ID. The list of codes may be empty.

    value: a list with one integer or token per level, or a list with one text, such as "1,2,3" or
        "<|sid_begin|><s_a_1><s_b_2><|sid_end|>"
    """
    words = _words(value[0]) if len(value) == 1 and isinstance(value[0], str) else value
    codes = [_code(word) for word in words]
    if None in codes:
        first, last = (isinstance(word, str) and MARKER.fullmatch(word.strip()) for word in (words[0], words[-1]))
        codes = codes[1 if first else 0:-1 if last else None]
    return None if None in codes else codes


def _words(text: str) -> list[str]:
    """Split a text into its words. The text may also be a Python list, as pandas writes it into a cell."""
    text = text.strip()
    is_list = text[:1] + text[-1:] in ("[]", "()")
    words = SEPARATOR.split(text[1:-1].strip() if is_list else text)
    return [word[1:-1] if is_list and word[:1] == word[-1:] and word[:1] in ("'", '"') else word for word in words]


def _code(word: object) -> int | None:
    if isinstance(word, str):
        return _code_of_text(word)
    return word if type(word) is int and 0 <= word <= 999_999_999 else None


@lru_cache(maxsize=100_000)  # most tokens occur in many IDs
def _code_of_text(word: str) -> int | None:
    match = CODE.fullmatch(word.strip())
    return int(match["token"] or match["number"]) if match else None


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
        entries = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=partial(_without_duplicates, path))
    except (ValueError, RecursionError) as error:
        raise DataError(path, "is not valid JSON", str(error), "use a valid index.json in UTF-8") from error
    if not isinstance(entries, dict):
        raise DataError(path, "is not a JSON object", 'Expected {"<raw id>": ["<a_12>", "<b_3>", ...], ...}',
                        "use a valid index.json")
    for raw_id, value in entries.items():
        yield f"{path}: {raw_id!r}", raw_id, value if isinstance(value, list) else [value]


def _without_duplicates(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        [(raw_id, _)] = Counter(raw_id for raw_id, _ in pairs).most_common(1)
        raise _duplicate(f"{path}: {raw_id!r}", raw_id)
    return entries


def _read_csv(path: Path) -> Iterator[tuple[str, str, list]]:
    """For each line of a CSV file, yield its location (for error messages), the raw id and the cells with codes.

    The first line is a header if it names a column of raw ids, or if no cell after its first cell is a semantic ID.
    Without a header, the first column has the raw ids. Empty cells at the end of a line are left out.
    """
    id_column, ignored, is_first = 0, {0}, True
    for number, row in _csv_rows(path):
        if not any(row):
            continue
        if is_first and (_raw_id_column(row) is not None or not any(parse([cell]) for cell in row[1:])):
            id_column, ignored = _columns(row)
        elif len(row) <= id_column:
            raise DataError(f"{path}:{number}", "has no raw id", f"The raw id is in column {id_column + 1}, but the "
                            f"line has {len(row)} columns", "correct the line")
        else:
            cells = [cell for column, cell in enumerate(row) if column not in ignored]
            while cells and not cells[-1].strip():
                cells.pop()
            yield f"{path}:{number}", row[id_column], cells
        is_first = False


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


def _columns(header: list[str]) -> tuple[int, set[int]]:
    """Return the column of the raw ids, and all columns that contain no codes."""
    names, id_column = _names(header), _raw_id_column(header) or 0
    ignored = {id_column} | {column for column, name in enumerate(names) if name in RAW_ID + TEXT or
                             (column < id_column and ROW_NUMBER.fullmatch(name))}
    whole = {column for column, name in enumerate(names) if name in WHOLE_ID and column not in ignored}
    # If the codes have columns of their own, a column with whole semantic IDs only repeats them.
    has_levels = any(name for column, name in enumerate(names) if column not in ignored | whole)
    return id_column, ignored | whole if has_levels else ignored


def _raw_id_column(header: list[str]) -> int | None:
    """Return the column of the raw ids if the header names it, else None."""
    names = _names(header)
    for name in RAW_ID:
        if name in names:
            return names.index(name)
    # If the first column has the row numbers of pandas, a later column such as movie_id has the raw ids.
    similar = [column for column, name in enumerate(names) if name.endswith("id") and name not in WHOLE_ID]
    return similar[0] if ROW_NUMBER.fullmatch(names[0]) and len(similar) == 1 and len(names) > 2 else None


def _names(header: list[str]) -> list[str]:
    # RecBole adds types, such as item_id:token, and pandas numbers, such as Unnamed: 0.
    return [name.strip().casefold().partition(":")[0] for name in header]
