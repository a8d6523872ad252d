"""Helpers of several test files: raw files, options, output checks, and a server with scripted faults."""

import contextlib
import gzip
import http.server
import io
import json
import logging
import re
import socket
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import duckdb

from common.artifacts import DatasetFolder
from common.command import run_command
from dataloader.options import Options, ProcessOptions, parse_options
from tests.errors import Outcome


def run_here(main: Callable[[list[str]], None], flags: list[str], cwd: Path) -> Outcome:
    """Run a command in this process, which is faster than a process of its own."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    root = logging.getLogger()
    before = root.handlers[:]
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(main, flags)
    root.handlers[:] = before
    return Outcome(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def mentions(text: str, *values: object) -> bool:
    """Whether the text contains all values, each as a whole word or number."""
    return all(re.search(rf"(?<![\w.]){re.escape(str(value))}(?!\w|\.\d)", text) for value in values)


def logged(caplog, *values: object, level: int = logging.INFO) -> bool:
    """Whether one log record of this level mentions all values."""
    return any(record.levelno == level and mentions(record.getMessage(), *values) for record in caplog.records)


def write_gz(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode("utf-8"), mtime=0))


def review(user: str, item: str, time: int, rating: float = 5.0) -> str:
    return json.dumps({"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time,
                       "reviewText": "Nice."})


def write_baby(raw: Path, events: list[tuple[str, str, int]], metadata: list[str] = ()) -> None:
    """The two raw files of `Baby`, with events as (user, item, time)."""
    write_gz(raw / "reviews_Baby_5.json.gz", [review(*event) for event in events])
    write_gz(raw / "meta_Baby.json.gz", list(metadata))


WHEEL_FOLDER = "recbole/dataset_example/ml-100k/ml-100k"


def write_wheel(path: Path, events: list[str], items: list[str]) -> None:
    """Write ml-100k as the recbole package stores it: one event or item per line, tabs between the fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
        archive.writestr(f"{WHEEL_FOLDER}.inter", "".join(f"{line}\n" for line in [header, *events]))
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        archive.writestr(f"{WHEEL_FOLDER}.item", "".join(f"{line}\n" for line in [header, *items]))


def make_options(data_root: Path, *flags: str) -> Options:
    return parse_options(["--data_root", str(data_root), *flags], "for a test")


def process_options(data_root: Path, *flags: str) -> ProcessOptions:
    return make_options(data_root, *flags).process


def table(path: Path, columns: str = "*") -> list[tuple]:
    """Return the rows of a parquet file in the stored order."""
    return duckdb.read_parquet(str(path)).project(columns).fetchall()


def contents(folder: DatasetFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder.interactions, folder.items, folder.users)}


class Reply(NamedTuple):
    """The answer of the server to one request."""

    body: bytes = b""
    status: int = 200
    etag: str = '"first"'
    ranges: str = "honoured"              # or "ignored", or "blind": a part even if the file changed
    cut: int | None = None                # close the connection after so many bytes of the answer
    length: str = "told"                  # or "chunked", "untold", or a wrong number: "short", "long"
    headers: dict[str, str] = {}
    wait: threading.Event | None = None   # send nothing at the cut until the event is set
    before: Callable[[], object] | None = None  # called before the answer, such as `wait` of an event or a barrier
    hang_up: bool = False                 # close the connection without an answer


class Asked(NamedTuple):
    path: str
    headers: dict[str, str]


class FaultyServer:
    """Answers each path with its replies in turn, then always with the last one; unknown paths with 404."""

    def __init__(self):
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[Asked] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802 (the name that http.server calls)
                server.answer(self)

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request, client_address):  # the client closed the connection
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def serve(self, path: str, *replies: Reply) -> str:
        self.replies[path] = list(replies)
        return self.url + path

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.asked.append(Asked(handler.path, dict(handler.headers)))
        handler.close_connection = True
        queue = self.replies.get(handler.path, [Reply(status=404)])
        reply = queue.pop(0) if len(queue) > 1 else queue[0]
        if reply.before is not None:
            reply.before()
        if reply.hang_up:
            return
        body, status, headers = _part_of(reply, handler.headers)
        if reply.length == "chunked":
            handler.protocol_version = "HTTP/1.1"
            headers["Transfer-Encoding"] = "chunked"
            body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in _chunks(body)) + b"0\r\n\r\n"
        elif reply.length != "untold":
            headers["Content-Length"] = str(len(body) + 1000 if reply.length == "long" else
                                            reply.cut if reply.length == "short" else len(body))
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:reply.cut])
        if reply.wait is not None:
            handler.wfile.flush()
            reply.wait.wait(timeout=10)
            handler.wfile.write(body[reply.cut:])


def _part_of(reply: Reply, asked: dict[str, str]) -> tuple[bytes, int, dict[str, str]]:
    headers = {**({"ETag": reply.etag} if reply.etag else {}), **reply.headers}
    if "Range" not in asked or reply.ranges == "ignored" or reply.status != 200:
        return reply.body, reply.status, headers
    if reply.ranges == "honoured" and asked.get("If-Range") != (reply.etag or headers.get("Last-Modified")):
        return reply.body, 200, headers
    start = int(asked["Range"].removeprefix("bytes=").removesuffix("-"))
    if start >= len(reply.body):
        return b"", 416, {**headers, "Content-Range": f"bytes */{len(reply.body)}"}
    headers["Content-Range"] = f"bytes {start}-{len(reply.body) - 1}/{len(reply.body)}"
    return reply.body[start:], 206, headers


def _chunks(body: bytes) -> list[bytes]:
    return [body[start:start + 10_000] for start in range(0, len(body), 10_000)]


def closed_port() -> str:
    """Return an address on loopback whose port is closed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
