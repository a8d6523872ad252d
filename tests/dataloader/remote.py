"""Helpers of the tests of fetching: contents, short waits, and the request for a file."""

import gzip
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataloader import fetch as fetching
from dataloader.fetch import RemoteFile, Transfer, Unreachable
from tests.dataloader.helpers import mentions

WHOLE = gzip.compress(random.Random(0).randbytes(300_000), mtime=0)
OTHER = gzip.compress(random.Random(1).randbytes(280_000), mtime=0)
HTML = b"<!DOCTYPE html><html><body>Moved to our new site</body></html>"
ROOT = Path(__file__).resolve().parents[2]


def shorten_waits(monkeypatch) -> None:
    monkeypatch.setattr(fetching, "PATIENCE", fetching.PATIENCE._replace(first=0.01))
    monkeypatch.setattr(fetching, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(fetching, "STALL_TIMEOUT", 0.3)


def get(target: Path, *addresses: str, force: bool = False, stop: threading.Event | None = None, **known) -> None:
    if tried := Transfer(RemoteFile(target, list(addresses), **known), stop or threading.Event()).fetch(force):
        raise Unreachable(tried)


@contextmanager
def unreachable(address: str, *values: object) -> Iterator[None]:
    """The block raises Unreachable with one line, for this address, that mentions the values."""
    with pytest.raises(Unreachable) as raised:
        yield
    [line] = raised.value.tried
    assert line.startswith(f"{address}: "), line
    assert mentions(line.removeprefix(f"{address}: "), *values), line


def reason(address: str, text: str) -> str:
    """The part of an error about one address: from this address to the next one."""
    assert text.count(f"{address}: ") == 1, text
    return re.split(r"\shttps?://", text.partition(f"{address}: ")[2])[0]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def put_part(target: Path, address: str, content: bytes, tag: str | None = None) -> None:
    """Leave a partial download, as a killed process does."""
    target.parent.mkdir()
    beside(target, ".part").write_bytes(content)
    beside(target, ".part.tag").write_text(json.dumps({"address": address, "validator": '"first"'})
                                           if tag is None else tag)
