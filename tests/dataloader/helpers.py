"""What several files of these tests share: raw files, options, and a server with scripted faults."""

import contextlib
import gzip
import http.server
import io
import json
import logging
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
    """A command in this process, which spares the start of another one."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    root = logging.getLogger()
    before = root.handlers[:]
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(main, flags)
    root.handlers[:] = before
    return Outcome(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


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
    """ml-100k as the recbole package holds it: one event or item a line, tabs between the fields."""
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
    """The rows of a parquet file in the order in which they are stored."""
    return duckdb.read_parquet(str(path)).project(columns).fetchall()


def contents(folder: DatasetFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder.interactions, folder.items, folder.users)}


class Reply(NamedTuple):
    """How the server answers one request."""

    body: bytes = b""
    status: int = 200
    etag: str = '"first"'
    ranges: str = "honoured"              # or "ignored", or "blind": a part even if the file changed
    cut: int | None = None                # close the connection after so many bytes of the answer
    length: str = "told"                  # or "chunked", "untold", or "short" or "long": a wrong number
    headers: dict[str, str] = {}
    wait: threading.Event | None = None   # keep silent at the cut, then go on
    before: Callable[[], object] | None = None  # called before the answer, such as an event's or a barrier's wait
    hang_up: bool = False                 # close the connection in place of an answer


class Asked(NamedTuple):
    path: str
    headers: dict[str, str]


class FaultyServer:
    """Answers every path with its replies in turn, the last one for ever; unknown paths with 404."""

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
            def handle_error(self, request, client_address):  # a client that has left
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
    """An address on loopback at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
