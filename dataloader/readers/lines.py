"""Read files with one record per line, in JSON or as a Python literal. Literals are parsed, but never executed."""

import ast
import gzip
import json
import multiprocessing
import os
import re
import signal
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import islice
from pathlib import Path

from common.errors import DataError, ResourceError
from common.progress import Progress

MAX_LINE = 32 << 20      # bytes; a longer line is invalid
MAX_FIELD = 1_000_000    # characters; longer raw texts are cut. The final text of an item is much shorter
MAX_DEPTH = 5            # levels of nested objects whose fields have dotted names
MAX_LITERAL = 1_000_000  # bytes; Python's own parser needs hundreds of bytes of memory per byte of a literal
# Exceptions of the parsers for an invalid line. The last two mean that the line is nested too deeply.
NO_RECORD = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)

# `(?>(...)*)` instead of `(...)*+`: before Python 3.11.5, a possessive group can match too much or too little.
STRING = rb"""('[^'\\]*+(?>(?:\\.[^'\\]*+)*)'|"[^"\\]*+(?>(?:\\.[^"\\]*+)*)")"""
# The pieces of a Python literal, for the conversion to JSON. Group 1: text and strings in which only the quotes must be
# replaced. Group 2: a string that needs more changes. Group 3: an invalid character.
RUNS = re.compile(rb"""((?>(?:[^'"\\]++|'[^'"\\]*+')+))|""" + STRING + b"|(.)", re.DOTALL)
# The same pieces, but group 1 contains only the text between strings.
BETWEEN = re.compile(rb"""([^'"\\]++)|""" + STRING + b"|(.)", re.DOTALL)
WORD = re.compile(rb"\b(?:None|True|False)\b")
LONG = re.compile(rb"\b(\d+)L\b")  # an integer in Python 2
JSON_WORDS = {b"None": b"null", b"True": b"true", b"False": b"false"}
# The escapes that can be converted to JSON. Escaped surrogates are not among them: a JSON parser would merge two of
# these into one character, so Python's parser must read such a line.
ESCAPE = re.compile(rb"""\\(?:(['"\\bfnrt])|(u(?![dD][89a-fA-F])[0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))|["\\]""")


def parse_json(line: bytes) -> dict:
    return _mapping(json.loads(_text(line)))


def parse_python(line: bytes) -> dict:
    """Parse a Python dict literal.

    The literal is converted to JSON and parsed as JSON, which is fast. If that fails, `ast.literal_eval` parses it.
    Objects that are often printed inside a dict are read as well, see `_Values`.
    """
    text = _text(line).strip()
    try:
        return _mapping(json.loads(_text(python_as_json(line)), parse_constant=_refuse))
    except ValueError:
        if len(line) > MAX_LITERAL:
            raise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about unknown escapes
        with suppress(ValueError, SyntaxError):
            return _mapping(ast.literal_eval(text))
        plain = BETWEEN.sub(_without_longs, text.encode())
        return _mapping(ast.literal_eval(_Values().visit(ast.parse(plain, mode="eval"))))


def _without_longs(match: re.Match) -> bytes:
    plain, string, _other = match.groups()
    if plain is None and string is None:
        raise ValueError("a quote or an escape outside of a string")
    return string or LONG.sub(rb"\1", plain)


class _Values(ast.NodeTransformer):
    """Replace objects in a syntax tree by values.

    nan, inf -> floating-point numbers; OrderedDict([('a', 1)]) -> {'a': 1}; datetime.date(2020, 1, 2) -> '2020-01-02';
    any other call with one argument, such as Timestamp('2020-01-02') -> its argument
    """

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("nan", "inf") else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        called, args = ast.unparse(node.func), [self.visit(arg) for arg in node.args]
        if called.endswith("OrderedDict"):
            pairs = [pair.elts for arg in args for pair in getattr(arg, "elts", []) if isinstance(pair, ast.Tuple)]
            return ast.Dict(keys=[key for key, _value in pairs], values=[value for _key, value in pairs])
        if called in ("datetime.datetime", "datetime.date"):
            found = datetime(*map(ast.literal_eval, args))
            return ast.Constant(str(found) if called == "datetime.datetime" else str(found.date()))
        return args[0] if len(args) == 1 and re.fullmatch(r"[\w.]+", called) else node


PARSERS: dict[str, Callable[[bytes], dict]] = {"json": parse_json, "python": parse_python}
NAMES = {"json": "JSON", "python": "Python"}
NOT_UTF8 = "is not UTF-8"  # the reason why a line is invalid


def _text(line: bytes) -> str:
    if len(line) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE:,} bytes")
    return line.decode("utf-8-sig")


def _mapping(record: object) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a Python literal")


def python_as_json(line: bytes) -> bytes:
    """Convert a Python literal to JSON by text replacement, which is faster than parsing the literal.

    Raises ValueError if a quote or an escape cannot be converted.
    """
    has_words = b"None" in line or b"True" in line or b"False" in line
    if not has_words and b'"' not in line and b"\\" not in line:
        return line.replace(b"'", b'"')
    return (BETWEEN if has_words else RUNS).sub(_piece, line)


def _piece(match: re.Match) -> bytes:
    plain, string, _other = match.groups()
    if plain:
        return plain.replace(b"'", b'"') if match.re is RUNS else WORD.sub(lambda w: JSON_WORDS[w.group()], plain)
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
        raise ValueError("an escape that JSON does not have")
    return b'\\"'


def value_at(record: dict, column: str) -> object:
    """Return the value of a column in a record, or None.

    The column `actor.id` is the field `id` in the object `actor`, unless the record has a field named `actor.id`.
    """
    if (value := record.get(column)) is not None or "." not in column:
        return value
    value = record
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def column_names(record: dict, prefix: str = "") -> Iterator[str]:
    """Yield the column names of a record. A field in a nested object has a dotted name, such as `actor.id`."""
    for key, value in record.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and prefix.count(".") < MAX_DEPTH:
            yield from column_names(value, f"{prefix}{key}.")


def plain_json(record: dict, fields: list[str], ids: list[str]) -> bytes:
    """Return a line of JSON with the given fields of a record. May raise the exceptions in NO_RECORD.

    A missing field is left out. A field in `ids` is also left out if its value is not valid Unicode.
    """
    kept = {field: _plain(value) for field in fields if (value := value_at(record, field)) is not None}
    for field in ids:
        if field in kept and not encodable(str(kept[field])):
            del kept[field]
    return json.dumps(kept, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _plain(value: object) -> object:
    """Convert a value to the types that JSON has, and cut strings to MAX_FIELD characters."""
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


NUM_FIRST = 100  # lines read to detect the format
BLOCK = 4 << 20  # bytes of lines parsed at a time
PACKED_BLOCK = 1 << 20  # compressed bytes checked at a time
CHECKED = 256 << 10  # bytes decompressed at a time for the check; they fit into the cache of a core
GZIP = 16 + zlib.MAX_WBITS  # zlib's code for the format of gzip
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


REPLACE = "replace the file by a complete copy"


class DamagedError(DataError):
    """A raw file ends too early, or its checksum is wrong."""


def is_gzip(path: Path) -> bool:
    """Return whether a file is gzipped. Its name may say otherwise: some programs unpack a file and keep its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_binary(path: Path):
    return gzip.open(path) if is_gzip(path) else path.open("rb")


def compression(path: Path) -> str:
    """Return the option `compression` of DuckDB's readers for a file."""
    return f"compression = '{'gzip' if is_gzip(path) else 'none'}'"


@contextmanager
def verifying(path: Path) -> Iterator[None]:
    """Compare the checksum of a gzipped file in a thread while the `with` block runs. DuckDB does not do this.

    Raises DataError at the end of the block if the file is damaged. Does not read a file that is not gzipped.
    """
    if not is_gzip(path):
        yield
        return
    stopped = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        check = pool.submit(verify, path, stopped)
        try:
            yield
            check.result()
        finally:
            stopped.set()


def verify(path: Path, stopped: threading.Event) -> None:
    """Read a gzipped file to its end, and check its checksums. End early if `stopped` is set.

    Raises DataError if the file is damaged.
    """
    try:
        with path.open("rb") as file:
            member = zlib.decompressobj(GZIP)
            while not stopped.is_set() and (packed := file.read(PACKED_BLOCK)):
                while packed := packed.lstrip(b"\0") if member.eof else packed:  # zeros may follow a member
                    member = zlib.decompressobj(GZIP) if member.eof else member
                    member.decompress(packed, CHECKED)
                    packed = member.unused_data if member.eof else member.unconsumed_tail
            while not member.eof and member.decompress(b"", CHECKED):  # what the last call has left
                pass
            if not (stopped.is_set() or member.eof):
                raise EOFError("The compressed data ends too early")
    except DAMAGED as error:
        raise damaged(path, error) from error


def select_rows(rows: Iterator[tuple], numbers: Iterator[int]) -> Iterator[tuple]:
    """Yield the rows at the indices `numbers`, which must be in ascending order."""
    passed = 0
    for number in numbers:
        yield next(islice(rows, number - passed, None))
        passed = number + 1


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) for every line of a file that is not blank.

    The line numbers begin at 1. Raises DataError if the file is damaged.
    """
    number = 0
    for block in blocks(path):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line.strip():
                yield number, line


def first_format(path: Path) -> str | None:
    """Return the format of the first valid record in a file: "json" or "python".

    Returns "" if none of the first NUM_FIRST lines is a valid record. Returns None if the file is empty or damaged.
    """
    found = None
    with suppress(OSError, DataError):  # the code that reads the whole file reports the error
        for _number, line in islice(numbered_lines(path), NUM_FIRST):
            found = ""
            for name, parse in PARSERS.items():
                with suppress(*NO_RECORD):
                    parse(line)
                    return name
    return found


def rewrite(path: Path, target: Path, format_: str) -> None:
    """Convert a file to uncompressed JSON lines, and leave out blank lines.

    `format_` is "json" or "python". A line that is too long or cannot be converted becomes `{}`.
    """
    size = path.stat().st_size
    with target.open("wb") as out, Progress(f"read {path.name}", size, "B") as progress:
        for block in _in_processes(size, ((block, format_) for block in blocks(path, progress))):
            out.write(block)


def blocks(path: Path, progress: Progress | None = None) -> Iterator[bytes]:
    """Yield the content of a file in blocks of whole lines, a few megabytes each.

    A line that is much longer than MAX_LINE is cut, but it stays too long to be valid.
    """
    rest = b""
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if is_gzip(path) else raw
            while block := file.read(BLOCK):
                if progress is not None:
                    progress.update(raw.tell() - progress.done)
                head, end, tail = block.rpartition(b"\n")
                if end:
                    yield rest + head + end
                    rest = tail
                elif len(rest) <= MAX_LINE:
                    rest += block
    except DAMAGED as error:
        raise damaged(path, error) from error
    if rest.strip():
        yield rest


def damaged(path: Path, error: BaseException) -> DamagedError:
    """Return the error for a damaged file. The error names the first line that cannot be read."""
    num_lines = 0
    # Read small blocks: a read that fails does not return the valid bytes before the damage.
    with suppress(*DAMAGED), open_binary(path) as file:
        while some := file.read1(4096):
            num_lines += some.count(b"\n")
    return DamagedError(f"{path}:{num_lines + 1}", "the file is damaged, at the latest in this line",
                        f"Only the {num_lines} lines before this line can be read ({error or type(error).__name__})",
                        REPLACE)


def _in_processes(size: int, tasks: Iterator[tuple]) -> Iterator[bytes]:
    """Run `_rewrite_block` on every task in several processes, and yield the results in the order of the tasks."""
    num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if size < BLOCK or num_workers == 1:
        yield from (_rewrite_block(*task) for task in tasks)
        return
    waiting = deque()
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        for task in tasks:
            waiting.append(pool.submit(_rewrite_block, *task))
            if len(waiting) > 2 * num_workers:  # keep only a few blocks in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError("memory", "a worker process was killed", "Most likely the memory was full",
                            "close other programs, or use a machine with more memory") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _follow_parent() -> None:
    """Make a worker process ignore Ctrl-C, and exit when its parent process ends (even if the parent is killed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def _rewrite_block(block: bytes, format_: str) -> bytes:
    written = []
    for line in filter(bytes.strip, block.split(b"\n")):
        try:
            written.append(b"{}" if len(line) > MAX_LINE else python_as_json(line) if format_ == "python" else line)
        except ValueError:
            written.append(b"{}")
    return b"\n".join([*written, b""])
