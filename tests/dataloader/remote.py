"""What the tests of fetching share: contents, short waits, and how a file is asked for."""

import gzip
import hashlib
import json
import random
import threading
import time
from pathlib import Path

from dataloader import fetch as fetching
from dataloader.fetch import RemoteFile, Transfer, Unreachable

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
    """What a process that was killed leaves behind."""
    target.parent.mkdir()
    beside(target, ".part").write_bytes(content)
    beside(target, ".part.tag").write_text(json.dumps({"address": address, "validator": '"first"'})
                                           if tag is None else tag)
