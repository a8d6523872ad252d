"""One line, one record: JSON, or a Python literal, which is read without running it."""

import ast
import json
import re
import warnings
from collections.abc import Callable

MAX_LINE = 32 << 20      # bytes; a longer line is no record
MAX_FIELD = 1_000_000    # characters of one text that are taken over; an item's whole text is cut far below that
MAX_LITERAL = 1_000_000  # bytes that Python's own parser may get, which needs hundreds of bytes for each
# What a line that is no record raises; the last two stand for one that is nested too deeply for its parser.
NO_RECORD = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)

STRING = rb"""('[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+")"""
# Long runs of what needs no more than other quotes, strings that need more, and what is no literal.
RUNS = re.compile(rb"""((?:[^'"\\]++|'[^'"\\]*+')++)|""" + STRING + b"|(.)", re.DOTALL)
# The same, with what lies between strings by itself.
BETWEEN = re.compile(rb"""([^'"\\]++)|""" + STRING + b"|(.)", re.DOTALL)
WORD = re.compile(rb"\b(?:None|True|False)\b")
JSON_WORDS = {b"None": b"null", b"True": b"true", b"False": b"false"}
# Half a surrogate pair is left to Python's parser: JSON's would join two of them.
ESCAPE = re.compile(rb"""\\(?:(['"\\bfnrt])|(u(?![dD][89a-fA-F])[0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))|["\\]""")


def parse_json(line: bytes) -> dict:
    return _mapping(json.loads(_text(line)))


def parse_python(line: bytes) -> dict:
    """A dict as Python writes it. What JSON cannot say goes to Python's own parser for literals."""
    text = _text(line).strip()
    try:
        return _mapping(json.loads(_text(python_as_json(line)), parse_constant=_refuse))
    except ValueError:
        if len(line) > MAX_LITERAL:
            raise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that Python does not know
        return _mapping(ast.literal_eval(text))


PARSERS: dict[str, Callable[[bytes], dict]] = {"json": parse_json, "python": parse_python}
NAMES = {"json": "JSON", "python": "Python"}


def _text(line: bytes) -> str:
    if len(line) > MAX_LINE:
        raise ValueError(f"it is longer than {MAX_LINE:,} bytes")
    return line.decode("utf-8-sig")


def _mapping(record: object) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}, not a record")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no literal")


def python_as_json(line: bytes) -> bytes:
    """A Python literal in JSON's writing: its quotes, escapes and names. What JSON has not, stays and is no JSON.

    Far faster than to parse the literal. Raises ValueError where a string does not end or has an escape that JSON has
    not.
    """
    has_words = b"None" in line or b"True" in line or b"False" in line
    if not has_words and b'"' not in line and b"\\" not in line:
        return line.replace(b"'", b'"')
    return BETWEEN.sub(_piece_with_words, line) if has_words else RUNS.sub(_piece, line)


def _piece(match: re.Match) -> bytes:
    run, string, _other = match.groups()
    return run.replace(b"'", b'"') if run else _json_string(string)


def _piece_with_words(match: re.Match) -> bytes:
    between, string, _other = match.groups()
    return WORD.sub(lambda word: JSON_WORDS[word.group()], between) if between else _json_string(string)


def _json_string(string: bytes | None) -> bytes:
    if string is None:
        raise ValueError("a quote or an escape outside of a string")
    inside = string[1:-1]
    return b'"%b"' % (ESCAPE.sub(_json_escape, inside) if b"\\" in inside or b'"' in inside else inside)


def _json_escape(match: re.Match) -> bytes:
    simple, unicode, byte = match.groups()
    if simple:
        return b"'" if simple == b"'" else match.group()
    if unicode or byte:
        return b"\\" + unicode if unicode else b"\\u00" + byte
    if match.group() == b"\\":
        raise ValueError("an escape that JSON has not")
    return b'\\"'


def plain_json(record: dict, fields: list[str], ids: list[str]) -> bytes:
    """A line of JSON with these fields alone. An id that no encoding can hold is left out.

    Raises one of NO_RECORD for what is nested too deeply.
    """
    kept = {field: _plain(record[field]) for field in fields if record.get(field) is not None}
    for field in ids:
        if field in kept and not encodable(str(kept[field])):
            del kept[field]
    return json.dumps(kept, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _plain(value: object) -> object:
    """Strings no longer than MAX_FIELD, numbers, and lists and records of them."""
    if isinstance(value, str):
        return value[:MAX_FIELD]
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return value if value is None or isinstance(value, int | float) else str(value)


def encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
