"""One attempt to bring a file over HTTP: continued where the one before it stopped, and never spliced."""

import itertools
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import requests
import urllib3

from common.errors import ResourceError, without_secrets

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0  # seconds
STALL_TIMEOUT = 30.0    # seconds without a byte
CHUNK = 1 << 16         # bytes; a cut costs no more than these
HEAD = 64               # bytes; they tell what kind of file begins
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others a little later


class Refused(Exception):
    """An address will not serve the file; to ask it again would be useless."""


class Failed(Exception):
    """A fault that may pass. `wait`: for how many seconds the server asks to be left alone."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


class NoSuchHost(Failed):
    """A name that could not be looked up, which passes only if it has been found before."""


class Stopped(Exception):
    """The run is to end; what has come so far is kept."""


@dataclass
class Transfer:
    """How far a file has come: written by the thread that fetches it, read by the one that shows the progress."""

    name: str
    got: int = 0         # bytes in the part
    received: int = 0    # bytes that came over the network, those that had to be thrown away too
    total: int = 0       # 0: not known
    resumed: bool = False  # whether the attempt continues an earlier one
    doing: str = "waiting"

    def begin(self, start: int, total: int) -> None:
        self.got, self.total, self.resumed, self.doing = start, total, start > 0, ""

    def add(self, count: int) -> None:
        self.got += count
        self.received += count

    @property
    def state(self) -> str:
        if self.doing:
            return self.doing
        return f"{100 * self.got / self.total:.0f} %" if self.total else f"{self.got / 1e6:.1f} MB"


class Part:
    """`<name>.part`, the bytes so far, and `<name>.part.tag`: which version, at which address, they begin."""

    def __init__(self, target: Path):
        self.path = target.with_name(target.name + ".part")
        self.tag = target.with_name(target.name + ".part.tag")
        self.bad = target.with_name(target.name + ".bad")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self, address: str) -> str:
        """What `address` calls the version that lies here in part; empty if that cannot be continued."""
        try:
            tag = json.loads(self.tag.read_text(encoding="utf-8"))
            return tag["validator"] if tag["address"] == without_secrets(address) else ""
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or a half-written one
            return ""

    def begin(self, address: str, validator: str) -> None:
        """Start anew. Emptied first, so that at no moment a tag stands beside the bytes of another version."""
        self.path.write_bytes(b"")
        self.tag.write_text(json.dumps({"address": without_secrets(address), "validator": validator}), encoding="utf-8")

    def discard(self) -> None:
        self.tag.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def keep_as_bad(self) -> None:
        self.tag.unlink(missing_ok=True)
        os.replace(self.path, self.bad)


def receive(part: Part, address: str, size: int | None, check_head: Callable[[bytes], None], transfer: Transfer,
            stop: threading.Event) -> None:
    """Bring what `part` still lacks of the file at `address`; `size` is what the whole must have, if that is known.

    `check_head` gets the first bytes of a file that is begun, before an earlier part is given up for it; it may
    raise Refused. Raises Refused, Failed or Stopped, and leaves what has come in the part for the next attempt.
    """
    start, validator = part.size, part.validator(address)
    headers = {"Accept-Encoding": "identity"}
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with _ask(address, headers) as response:
        start = _start(response, part, start, validator)
        if response.status_code == 416:  # nothing is lacking
            transfer.begin(start, start)
            return
        transfer.begin(start, _total(response, start, size))
        _refuse_full_disk(part, transfer)
        with _naming_faults(transfer):
            chunks = response.raw.stream(CHUNK, decode_content=False)  # some servers call a .gz file an encoded page
            if start:
                log.info("download: continuing %s after %d bytes", transfer.name, start)
            else:
                first = _first_bytes(chunks)
                check_head(first)
                part.begin(address, _validator_of(response))
                chunks = itertools.chain([first], chunks)
            _append(chunks, part, transfer, stop)
    if transfer.total and transfer.got != transfer.total:
        raise Failed(_cut_off(transfer))


def _ask(address: str, headers: dict[str, str]) -> requests.Response:
    """The answer, of which only the headers have been read."""
    try:
        return requests.get(address, stream=True, timeout=(CONNECT_TIMEOUT, STALL_TIMEOUT), headers=headers)
    except requests.exceptions.SSLError as error:
        raise Refused(f"no secure connection: {_innermost(error)}") from error
    except requests.ConnectTimeout as error:
        raise Failed(f"cannot connect: no answer within {CONNECT_TIMEOUT:g} s") from error
    except requests.ReadTimeout as error:
        raise Failed(f"no answer within {STALL_TIMEOUT:g} s") from error
    except requests.ConnectionError as error:
        cause = _innermost(error)
        kind = NoSuchHost if isinstance(cause, socket.gaierror) else Failed
        proxy = " to the proxy" if isinstance(error, requests.exceptions.ProxyError) else ""
        raise kind(f"cannot connect{proxy}: {getattr(cause, 'strerror', None) or cause}") from error
    except requests.RequestException as error:  # an address that is none, too many redirects
        raise Refused(str(error)) from error


def _innermost(error: BaseException) -> BaseException:
    """What the system said; the errors around it only repeat the address."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _fault(response: requests.Response) -> Refused | Failed:
    answer = f"answered {response.status_code} {response.reason or ''}".rstrip()
    if response.status_code in PASSING:
        return Failed(answer, _retry_after(response.headers.get("Retry-After", "")))
    return Refused(answer)


def _retry_after(text: str) -> float:
    """Seconds, from a number of them or from a date; 0 if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _validator_of(response: requests.Response) -> str:
    """A name of this version that If-Range understands, or the empty string."""
    etag = response.headers.get("ETag", "")
    # A weak one calls versions alike that differ in their bytes.
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _start(response: requests.Response, part: Part, start: int, validator: str) -> int:
    """Where in the file the answer begins; raises Refused or Failed where it is not that file."""
    if response.status_code == 200:
        return 0
    if response.status_code not in (206, 416):
        raise _fault(response)
    if not _continues(response, start, validator):
        part.discard()
        raise Failed("the server no longer has the file that was being continued")
    return start


def _continues(response: requests.Response, start: int, validator: str) -> bool:
    """Whether a 206 begins, or a 416 says that the file ends, where the part does; some servers ignore If-Range."""
    if not validator or (_validator_of(response) or validator) != validator:
        return False
    span = response.headers.get("Content-Range", "")
    return span.startswith(f"bytes {start}-") if response.status_code == 206 else span == f"bytes */{start}"


def _total(response: requests.Response, start: int, expected: int | None) -> int:
    """The size of the whole file, as it is known or as the server tells it; 0 if neither. They must not differ."""
    length = response.headers.get("Content-Length", "")
    if "Transfer-Encoding" in response.headers or not re.fullmatch(r"[0-9]{1,18}", length):
        return expected or 0
    total = start + int(length)
    if expected not in (None, total):
        raise Refused(f"has {total} bytes, {expected} are expected")
    return total


def _refuse_full_disk(part: Part, transfer: Transfer) -> None:
    free, needed = shutil.disk_usage(part.path.parent).free, transfer.total - part.size
    if needed > free:
        raise ResourceError(part.path, "does not fit on the disk", f"{needed} bytes are needed, {free} are free",
                            "free space there, or --data_root DIR on a larger disk")


@contextmanager
def _naming_faults(transfer: Transfer) -> Iterator[None]:
    """Turns what happens to a connection while the bytes come into Failed."""
    try:
        yield
    except urllib3.exceptions.TimeoutError as error:
        raise Failed(f"silent for {STALL_TIMEOUT:g} s, {_cut_off(transfer)}") from error
    except urllib3.exceptions.HTTPError as error:
        raise Failed(_cut_off(transfer)) from error


def _cut_off(transfer: Transfer) -> str:
    return f"cut off after {transfer.got} of {transfer.total or 'unknown'} bytes"


def _first_bytes(chunks: Iterator[bytes]) -> bytes:
    """HEAD bytes or more, unless there are fewer; a server may send them one by one."""
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= HEAD:
            break
    return first


def _append(chunks: Iterator[bytes], part: Part, transfer: Transfer, stop: threading.Event) -> None:
    try:
        with part.path.open("ab") as file:
            for chunk in chunks:
                if stop.is_set():
                    raise Stopped
                file.write(chunk)
                transfer.add(len(chunk))
                if transfer.total and transfer.got > transfer.total:
                    raise Refused(f"sends more than the {transfer.total} bytes that are expected")
    except Refused:
        part.discard()
        raise
    except OSError as error:  # a full disk does not say of which file
        error.filename = error.filename or str(part.path)
        raise
