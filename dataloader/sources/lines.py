"""Files of one record a line: their lines, where they stand, and Python literals made JSON in several processes."""

import gzip
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from common.errors import DataError, ResourceError
from common.progress import Progress
from dataloader.sources.records import MAX_LINE, python_as_json

BLOCK = 4 << 20  # bytes of lines that are parsed at a time
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def open_binary(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """`(number, line)` of every line that is not blank. Raises DataError where the file is damaged."""
    number = 0
    for block in _blocks(path):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line.strip():
                yield number, line


def rewrite(path: Path, target: Path, lines: str) -> None:
    """Write `target`: the lines that are not blank, unpacked, Python literals in JSON's writing.

    A line that is too long, or cannot be written as JSON, becomes `{}`, so that records keep their number. Several
    processes work on a large file. Raises DataError where the file is damaged.
    """
    size = path.stat().st_size
    with target.open("wb") as out, Progress(f"read {path.name}", size, "B") as progress:
        for block in _in_processes(size, ((block, lines) for block in _blocks(path, progress))):
            out.write(block)


def _blocks(path: Path, progress: Progress | None = None) -> Iterator[bytes]:
    """The file's lines, whole ones, some megabytes at a time; `progress` counts bytes as they lie on the disk.

    Of a line far longer than a record may be, what does not fit into memory is left out.
    """
    rest = b""
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
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


def damaged(path: Path, error: BaseException) -> DataError:
    """How far a file can be read is found in small steps: a large one that fails says nothing of what was good."""
    num_lines = 0
    try:
        with open_binary(path) as file:
            while some := file.read1(4096):
                num_lines += some.count(b"\n")
    except DAMAGED:
        pass
    return DataError(f"{path}:{num_lines + 1}", "the file is damaged from here on",
                     f"{num_lines} lines could be read; {error or type(error).__name__}", "fetch it again (--force)")


def _in_processes(size: int, tasks: Iterator[tuple]) -> Iterator[bytes]:
    """`_rewrite_block` of every task, in order; only a few are in memory at a time."""
    num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if size < BLOCK or num_workers == 1:
        yield from (_rewrite_block(*task) for task in tasks)
        return
    waiting = deque()
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        for task in tasks:
            waiting.append(pool.submit(_rewrite_block, *task))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError("memory", "a process that parses lines was killed", "most likely there was not enough",
                            "close other programs, or take a larger machine") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end with it, also if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocessing.Process) -> None:
    parent.join()
    os._exit(1)


def _rewrite_block(block: bytes, lines: str) -> bytes:
    return b"".join(_rewrite_line(line, lines) + b"\n" for line in block.split(b"\n") if line.strip())


def _rewrite_line(line: bytes, lines: str) -> bytes:
    if len(line) > MAX_LINE:
        return b"{}"
    try:
        return python_as_json(line) if lines == "python" else line
    except ValueError:
        return b"{}"
