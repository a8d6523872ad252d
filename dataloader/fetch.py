"""Downloads that try several addresses in order, resume after an interruption, and check each file.

`<name>.part` contains the bytes received so far. `<name>.part.tag` records the address that they come from, and the
version of the file. After the check, `<name>.part` is renamed to `<name>`, and the meta file `<name>.meta.json` is
written.
"""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import requests

from common.artifacts import load_meta
from common.errors import ResourceError, UserError, mask_secrets
from common.progress import Progress
from common.publishing import file_sha256, publish
from common.reading import parse_json, read_text
from dataloader.archives import HEAD, check_archive, check_head
from dataloader.http import (
    CutOff,
    NoSuchHost,
    PermanentFailure,
    RetryPolicy,
    Stopped,
    TemporaryFailure,
    answered,
    is_retryable,
    retry,
)

log = logging.getLogger(__name__)

AT_ONCE = 4             # files downloaded at the same time
PATIENCE = RetryPolicy(attempts=4, first=0.5, longest=60.0)  # applies to each address
WORTHWHILE = 16 << 20   # bytes; an attempt that receives at least this many resets the count of attempts
CONNECT_TIMEOUT = 10.0  # seconds
STALL_TIMEOUT = 30.0    # seconds without any data
CHUNK = 1 << 16         # bytes per write; if the connection is lost, at most this many bytes are lost
PIP = "pip download"
LOOK_EVERY = 0.1        # seconds between two updates of the progress


class RemoteFile(NamedTuple):
    """A file to download, with its size and sha256 if they are known."""

    target: Path
    addresses: list[str]      # URLs, tried in this order, or a single command that begins with PIP
    size: int | None = None   # bytes
    sha256: str | None = None


class Unreachable(Exception):
    """No address could deliver a file. `tried` has one line per address, with the reason."""

    def __init__(self, tried: list[str]):
        super().__init__("; ".join(tried))
        self.tried = tried


def is_fetched(path: Path) -> bool:
    """Return whether the file exists, has a meta file, and has the size that the meta file records."""
    with suppress(UserError):
        return bool(load_meta(path, ""))
    return False


def with_mirror(addresses: list[str], name: str, mirror: str | None) -> list[str]:
    """Return the addresses of the file `name`. If there is a mirror, the file's address on the mirror comes first.

    A query in the mirror's URL, such as a token, is kept.
    """
    if not mirror:
        return addresses
    parts = urlsplit(mirror)
    return [urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}")), *addresses]


def fetch_all(files: list[RemoteFile], force: bool = False) -> None:
    """Download the missing files, several at the same time. With `force`, download all files.

    Raises Unreachable at the end if some files could not be downloaded. Other errors, such as a full disk, are raised
    immediately. After an interruption, the next call continues from the `.part` files.
    """
    stop = threading.Event()
    transfers = [Transfer(file, stop) for file in files]
    # The pool's threads are daemons, so that an interrupted command does not wait for a server that does not respond.
    with ThreadPool(min(AT_ONCE, len(files))) as pool, Progress("download", 0, "B") as progress:
        jobs = [pool.apply_async(transfer.fetch, (force,)) for transfer in transfers]
        try:
            while pending := [job for job in jobs if not (job.ready() and job.successful())]:
                pending[0].wait(LOOK_EVERY)
                _show(progress, transfers)
                for job in filter(AsyncResult.ready, pending):
                    job.get()
            _show(progress, transfers)
        finally:
            stop.set()
    if tried := [line for job in jobs for line in job.get()]:
        raise Unreachable(tried)


def _show(progress: Progress, transfers: list["Transfer"]) -> None:
    """Show the progress of all files in one line: the total number of bytes, and the state of each file.

    The total includes only files of known size.
    """
    known = [transfer for transfer in transfers if transfer.total]
    got = sum(transfer.got for transfer in known)
    progress.total, progress.initial = sum(t.total for t in known), got - sum(t.received for t in known)
    if progress.bar is not None:
        progress.bar.total, progress.bar.initial = progress.total, progress.initial
    progress.update(got - progress.done, **{t.file.target.name: t.state for t in transfers})


class Transfer:
    """The download of one file. One thread runs `fetch` while another thread displays `state`."""

    def __init__(self, file: RemoteFile, stop: threading.Event):
        self.file, self.stop = file, stop
        self.part, self.tag, self.bad = (file.target.with_name(file.target.name + ending)
                                         for ending in (".part", ".part.tag", ".bad"))
        self.got = 0          # bytes in the part file
        self.received = 0     # bytes received over the network, including discarded ones
        self.total = 0        # bytes of the whole file, 0 if unknown
        self.resumed = False  # whether the current attempt continues an earlier one
        self.doing = "waiting"

    @property
    def state(self) -> str:
        return self.doing or (f"{100 * self.got / self.total:.0f} %" if self.total else f"{self.got / 1e6:.1f} MB")

    def fetch(self, force: bool = False) -> list[str]:
        """Download the file from the first address that delivers it completely.

        Returns an empty list if the download succeeded, or else one line per failed address. Raises Stopped if `stop`
        is set.
        """
        tried = []
        if not force and is_fetched(self.file.target):
            self.doing = "done"
            self._discard()  # an earlier run may have been killed right after it had published the file
            return []
        self.part.parent.mkdir(parents=True, exist_ok=True)
        for address in self.file.addresses:
            try:
                self._fetch_from(address)
            except PermanentFailure as failure:
                tried.append(mask_secrets(f"{address}: {failure}"))
                log.info("download: %s", tried[-1])
            else:
                log.info("download: %s, %.1f MB, from %s", self.file.target.name, self.got / 1e6, address)
                return []
        self.doing = "failed"
        return tried

    def _fetch_from(self, address: str) -> None:
        """Download the file from one address. Make several attempts if necessary.

        Raises PermanentFailure if the file cannot be downloaded from this address. Raises Stopped if `stop` is set.
        """
        received_at_start = received_before = self.received

        def attempt() -> None:
            if address.startswith(PIP):
                self._ask_pip(address)
            else:
                self._receive(address)
            self.doing = "checking"
            self._check()
            if self.stop.is_set():
                raise Stopped

        def on_failure(failure: TemporaryFailure, pause: float) -> bool:
            nonlocal received_before
            if isinstance(failure, NoSuchHost) and self.received == received_at_start:
                raise PermanentFailure(str(failure)) from failure  # no network: retrying does not help
            log.info("download: %s: %s; retrying in %.1f s", address, failure, pause)
            self.doing, num_bytes, received_before = "waiting", self.received - received_before, self.received
            return num_bytes >= WORTHWHILE

        retry(attempt, PATIENCE, self.stop, on_failure)

        def put(staged: Path) -> None:
            try:
                os.link(self.part, staged)  # a run that is killed before the meta file is written keeps the part file
            except OSError:                 # the file system does not support hard links
                os.replace(self.part, staged)

        publish(self.file.target, put, {"inputs": {}, "address": mask_secrets(address)})
        self._discard()
        self.doing = "done"

    def _receive(self, address: str) -> None:
        """Make one attempt to download the rest of the file and append it to the part file.

        If the server now has another version of the file, the download starts again from the first byte.
        """
        start, validator, headers = self._size(), "", {"Accept-Encoding": "identity"}
        with suppress(OSError, ValueError, KeyError, TypeError):  # the tag file is missing or damaged
            tag = parse_json(read_text(self.tag))
            validator = tag["validator"] if tag["address"] == mask_secrets(address) else ""
        if start and validator:
            headers |= {"Range": f"bytes={start}-", "If-Range": validator}
        timeout = (CONNECT_TIMEOUT, STALL_TIMEOUT)
        try:
            with requests.Session() as session, answered(session, "GET", address, timeout, headers=headers) as response:
                code = response.status_code
                if code not in (200, 206, 416):
                    message = f"HTTP {code} {response.reason or ''}".rstrip()
                    raise TemporaryFailure(message, response) if is_retryable(code) else PermanentFailure(message)
                # Some servers ignore If-Range. The download can continue only if the data of a 206 response starts at
                # the end of the part file, or if a 416 response says that the whole file is as long as the part file.
                span = response.headers.get("Content-Range", "")
                fits = span.startswith(f"bytes {start}-") if code == 206 else span == f"bytes */{start}"
                if code != 200 and not (fits and validator and (_validator_of(response) or validator) == validator):
                    self._discard()
                    raise TemporaryFailure("the server no longer has the version that was partly downloaded")
                self.got = start = 0 if code == 200 else start
                self.total = start if code == 416 else _total(response, start, self.file.size)
                self.resumed, self.doing = start > 0, ""
                if code != 416:  # for 416, the part file is already complete
                    self._append(response, address)
                if self.total and self.got != self.total:
                    raise CutOff("connection lost")
        except CutOff as cut:
            total = self.total or "an unknown number of"
            raise TemporaryFailure(f"{cut} after {self.got} of {total} bytes") from cut

    def _ask_pip(self, command: str) -> None:
        """Download the wheel of a package with pip, which uses the package index that the user has configured."""
        folder = self.part.parent
        for leftover in folder.glob(".wheel-*"):  # left by a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
            words = [sys.executable, "-m", *PIP.split(), "--quiet", "--disable-pip-version-check", "--no-deps",
                     "--only-binary=:all:", "--dest", scratch, command.removeprefix(PIP).strip()]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
            file = Path(scratch) / self.file.target.name
            if done.returncode or not file.exists():
                lines = done.stderr.strip().splitlines() or ["no output"]
                errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"]
                raise PermanentFailure((errors or lines)[-1])  # the last line of a traceback names the exception
            os.replace(file, self.part)
        self.got = self._size()

    def _append(self, response: requests.Response, address: str) -> None:
        """Append the response's bytes to the part file.

        In a new download, the first bytes are checked before an existing part file is overwritten.
        """
        free, needed = shutil.disk_usage(self.part.parent).free, self.total - self._size()
        if needed > free:
            raise ResourceError(self.part, "does not fit on the disk", f"{needed} bytes are needed, {free} are free",
                                "free some disk space and run the same command again, or use --data_root DIR on a "
                                "larger disk")
        # Do not decode the content: some servers send a .gz file with the header Content-Encoding: gzip.
        read = partial(response.raw.read, decode_content=False)
        chunks = iter(lambda: read(CHUNK), b"")
        if self.got:
            log.info("download: continuing %s after %d bytes", self.file.target.name, self.got)
        else:
            first = read(HEAD)
            check_head(first, self.file.target.suffix)
            # Empty the part file before writing the tag, so that a tag never describes the bytes of another version.
            self.part.write_bytes(b"")
            tag = {"address": mask_secrets(address), "validator": _validator_of(response)}
            self.tag.write_text(json.dumps(tag), encoding="utf-8")
            chunks = itertools.chain([first], chunks)
        try:
            with self.part.open("ab") as out:
                for chunk in chunks:
                    if self.stop.is_set():
                        raise Stopped
                    out.write(chunk)
                    self.got += len(chunk)
                    self.received += len(chunk)
                    if self.total and self.got > self.total:
                        self._discard()
                        raise PermanentFailure(f"the server sent more than the expected {self.total} bytes")
        except OSError as error:  # the error for a full disk does not name the file
            error.filename = error.filename or str(self.part)
            raise

    def _check(self) -> None:
        """Check the size and the content of the downloaded file, and delete the part file if the check fails.

        A file with a wrong sha256 is kept as `<name>.bad`. Raises PermanentFailure if the check fails. If the download
        was resumed, raises TemporaryFailure instead, because a download from the first byte may succeed.
        """
        size, sha256 = self.file.size, self.file.sha256
        try:
            if size not in (None, self._size()):
                raise PermanentFailure(f"the file has {self._size()} bytes, expected {size}")
            if sha256 is None:
                check_archive(self.part, self.file.target.suffix)
            elif (found := file_sha256(self.part)) != sha256:
                os.replace(self.part, self.bad)
                raise PermanentFailure(f"the file has sha256 {found}, expected {sha256}; it is kept as {self.bad.name}")
        except PermanentFailure as failure:
            self._discard()
            if self.resumed:
                raise TemporaryFailure(str(failure)) from failure
            raise

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard(self) -> None:
        self.tag.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)


def _validator_of(response: requests.Response) -> str:
    """Return the ETag of a response, else its modification date, else "".

    A request to continue the download sends this value in the header If-Range, to ask for the same version of the file.
    """
    etag = response.headers.get("ETag", "")
    # A weak ETag (W/...) is not used, because two versions with different bytes may have the same weak ETag.
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _total(response: requests.Response, start: int, expected: int | None) -> int:
    """Return the size of the whole file in bytes, or 0 if the size is unknown.

    The size is taken from the response, or else it is `expected`. Raises PermanentFailure if the two differ.
    """
    length = response.raw.length_remaining
    if None not in (length, expected) and start + length != expected:
        raise PermanentFailure(f"the file has {start + length} bytes, expected {expected}")
    return (expected or 0) if length is None else start + length


def fetch_wheel(wheel: dict, folder: Path, mirror: str | None) -> Path:
    """Download a wheel from the mirror or with pip, check its sha256, and return its path.

    The wheel is not installed. Raises Unreachable if the download fails.
    """
    target, sha256, tried = folder / wheel["file"], wheel["sha256"], []
    if is_fetched(target) and file_sha256(target) == sha256:
        return target
    if mirror:
        try:
            fetch_all([RemoteFile(target, with_mirror([], wheel["file"], mirror), sha256=sha256)], force=True)
            return target
        except Unreachable as unreachable:
            tried = unreachable.tried
    # Run pip in the caller's thread, so that an interruption also ends pip.
    command = f"{PIP} {wheel['package']}=={wheel['version']}"
    if failed := Transfer(RemoteFile(target, [command], sha256=sha256), threading.Event()).fetch(force=True):
        raise Unreachable(tried + failed)
    return target
