"""Files of one record a line: blocks of lines, their parsing in several processes, and where a line stands."""

import ast
import gzip
import json
import multiprocessing
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common.errors import DataError
from common.progress import Progress

BLOCK = 4 << 20        # bytes of lines that are parsed at a time
MAX_FIELD = 1_000_000  # characters of one text that are taken over; an item's whole text is cut far below that
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
# What a line that is no record raises; the last two stand for one that is nested too deeply for its parser.
NO_RECORD = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
STRING = re.compile(r"""('[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")""")


def parse_json(line: bytes) -> dict:
    return _mapping(json.loads(line.decode("utf-8-sig")))


def parse_python(line: bytes) -> dict:
    """A dict as Python writes it, without running it.

    Where no string has an escape, quoting them as JSON does is all that is to do, and that parser is ten times as fast.
    """
    text = line.decode("utf-8-sig").strip()
    if "\\" not in text:
        pieces = STRING.split(text)
        pieces[1::2] = ['"' + piece[1:-1].replace('"', '\\"') + '"' for piece in pieces[1::2]]
        try:
            return _mapping(json.loads("".join(pieces)))
        except ValueError:
            pass  # None, True, tuples and the like
    return _mapping(ast.literal_eval(text))


PARSERS: dict[str, Callable[[bytes], dict]] = {"json": parse_json, "python": parse_python}


def _mapping(record: object) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}, not a record")
    return record


def open_binary(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """`(number, line)` of every line that is not blank. Raises DataError where the file is damaged."""
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except DAMAGED as error:
        raise damaged(path, number + 1, error) from error


def damaged(path: Path, line: int, error: BaseException) -> DataError:
    return DataError(f"{path}:{line}", "the file is damaged from here on",
                     f"{line - 1} lines could be read; {error or type(error).__name__}", "fetch it again (--force)")


def convert(path: Path, target: Path, lines: str, fields: list[str], ids: list[str]) -> None:
    """Write `target`: for every line that is not blank one of plain JSON, with these fields alone.

    A line that cannot be read becomes `{}`, so that records keep their number; an id that no encoding can hold is left
    out. Several processes parse. Raises DataError where the file is damaged.
    """
    size = path.stat().st_size
    with target.open("wb") as out, Progress(f"read {path.name}", size, "B") as progress:
        parsed = _in_processes(size, ((block, lines, fields, ids) for block in _blocks(path, progress)))
        for block in parsed:
            out.write(block)


def _blocks(path: Path, progress: Progress) -> Iterator[bytes]:
    """The file's lines in blocks; `progress` counts bytes as they lie on the disk."""
    rest, num_lines = b"", 0
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            while block := file.read(BLOCK):
                progress.update(raw.tell() - progress.done)
                head, end, tail = block.rpartition(b"\n")
                if not end:
                    rest += block
                    continue
                yield rest + head + end
                num_lines += block.count(b"\n")
                rest = tail
    except DAMAGED as error:
        raise damaged(path, num_lines + 1, error) from error
    if rest.strip():
        yield rest


def _in_processes(size: int, tasks: Iterator[tuple]) -> Iterator[bytes]:
    """`_convert_block` of every task, in order; only a few are in memory at a time."""
    num_workers = os.cpu_count() or 1
    if size < BLOCK or num_workers == 1:
        yield from (_convert_block(*task) for task in tasks)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_convert_block, *task))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _convert_block(block: bytes, lines: str, fields: list[str], ids: list[str]) -> bytes:
    parse = PARSERS[lines]
    return b"".join(_convert_line(line, parse, fields, ids) for line in block.split(b"\n") if line.strip())


def _convert_line(line: bytes, parse: Callable[[bytes], dict], fields: list[str], ids: list[str]) -> bytes:
    try:
        record = parse(line)
        kept = {field: _plain(record[field]) for field in fields if record.get(field) is not None}
        for field in ids:
            if field in kept and not _encodable(str(record[field])):
                del kept[field]
        return json.dumps(kept, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    except NO_RECORD:
        return b"{}\n"


def _plain(value: object) -> object:
    """Strings and lists of them, no longer than `MAX_FIELD`; numbers as they are written."""
    if isinstance(value, str):
        return value[:MAX_FIELD]
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return {str(key): _plain(part) for key, part in value.items()} if isinstance(value, dict) else str(value)


def _encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
