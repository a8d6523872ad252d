"""Files and folders that appear whole or not at all.

A file that crosses a stage is published together with `<file>.meta.json`. Everything is staged next to its target, as
`.<name>.tmp-<token>`. A writer holds a lock while it works, so that others can tell its staged files from leftovers.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path

from common.distributed import is_main
from common.lock import lock

SCHEMA_VERSION = 2
SECONDS_TO_ABANDON = 86_400  # without a change, after which a staged file counts as left over where there are no locks


def publish(path: Path, write: Callable[[Path], None], meta: dict) -> dict:
    """Write `path` through `write(staged path)` with its meta beside it; returns the completed meta.

    Both are staged and synced before either gets its name. If the process dies between the two
    renames, the staged meta still lies there and describes the new content: the next reader
    finishes the publishing (`finish_publishing`). So the old pair or the new pair can always be read.
    Of several processes the first one writes.
    """
    if not is_main():
        return {"schema_version": SCHEMA_VERSION, **meta}
    path.parent.mkdir(parents=True, exist_ok=True)
    token, described = secrets.token_hex(8), False
    staged, staged_meta = _staged(path, token), _staged(meta_path(path), token)
    with _held(staged_meta):  # and not `staged`, in whose place `write` may put another file
        try:
            write(staged)
            meta = _described(staged, meta)
            staged_meta.write_bytes(_json(meta))
            described = True
            staged.chmod(staged_meta.stat().st_mode)  # safetensors makes its files readable by their owner alone
            for file in (staged, staged_meta):
                _sync(file)
            os.replace(staged, path)
        except BaseException:
            if staged.exists() or not described:  # else the content has its name, and a reader needs the staged meta
                staged.unlink(missing_ok=True)
                staged_meta.unlink(missing_ok=True)
            raise
        with suppress(FileNotFoundError):  # a reader has finished the publishing already
            os.replace(staged_meta, meta_path(path))
    _sync(path.parent)
    for name in (path.name, meta_path(path).name):
        sweep(path.parent, escape(name))
    return meta


def finish_publishing(path: Path) -> None:
    """Give the meta its name if a writer died after it had replaced the content."""
    prefix = f".{meta_path(path).name}.tmp-"
    # As long as the content is staged, too, its writer is not that far.
    staged = [file for file in path.parent.glob(f"{escape(prefix)}*")
              if not _staged(path, file.name.removeprefix(prefix)).exists()]
    if not staged or not path.exists():
        return
    sha256 = file_sha256(path)
    for candidate in staged:
        try:
            complete = json.loads(candidate.read_text(encoding="utf-8"))["sha256"] == sha256
        except (OSError, ValueError, KeyError):
            continue  # another writer's half-written or just renamed stage
        if complete:
            with suppress(FileNotFoundError):  # its writer or another reader was faster
                os.replace(candidate, meta_path(path))


def write_meta(path: Path, meta: dict) -> None:
    """Give a file that is there already, made elsewhere, the meta that other stages ask for."""
    write_bytes(meta_path(path), _json(_described(path, meta)))


def write_text(path: Path, text: str) -> None:
    """Replace a small text file that has no meta, whole or not at all."""
    write_bytes(path, _utf8(text))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file that has no meta, whole or not at all; when this returns it is on the disk.

    Of several processes the first one writes.
    """
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = _staged(path, secrets.token_hex(8))
    with _held(staged):
        try:
            staged.write_bytes(content)
            _sync(staged)
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    _sync(path.parent)


def publish_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `path` through `write(staged folder)`, whole or not at all.

    A folder that is there is moved aside first and removed when its successor has the name.
    """
    token = secrets.token_hex(8)
    staged, old = _staged(path, token), path.with_name(f".{path.name}.old-{token}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(staged, Path.mkdir):
        try:
            write(staged)
            for part in staged.rglob("*"):
                if part.is_file():
                    part.chmod(staged.stat().st_mode & 0o666)
                _sync(part)
            _sync(staged)
            if path.exists():
                path.rename(old)
            staged.rename(path)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)
    sweep(path.parent, escape(path.name))


def sweep(folder: Path, pattern: str) -> None:
    """Remove what writers of files or folders with such names left in `folder` when they were killed."""
    for kind in ("tmp", "old"):
        for left in folder.glob(f".{pattern}.{kind}-*"):
            with _abandoned(left) as abandoned:
                if abandoned and left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                elif abandoned:
                    left.unlink(missing_ok=True)


@contextmanager
def _held(staged: Path, make: Callable[[Path], None] = Path.touch) -> Iterator[None]:
    """Make a staged file or folder and hold its lock."""
    while True:
        make(staged)
        try:
            descriptor = os.open(staged, os.O_RDONLY if staged.is_dir() else os.O_RDWR)
        except FileNotFoundError:  # a sweeper came before the lock
            continue
        lock(descriptor, wait=True)
        if _is_at(descriptor, staged):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _abandoned(left: Path) -> Iterator[bool]:
    """Whether no writer holds this staged file or folder; none can take it while the block runs."""
    name, token = left.name[1:].rsplit("-", 1)
    target = left.with_name(name.rsplit(".", 1)[0])
    holders = (_staged(meta_path(target), token), _staged(target, token))
    try:
        changed = left.stat().st_mtime
        descriptor = os.open(next(filter(Path.exists, holders), left), os.O_RDONLY)
    except OSError:  # its writer was faster, or is another user
        yield False
        return
    try:
        locked = lock(descriptor)
        yield locked if locked is not None else time.time() - changed > SECONDS_TO_ABANDON
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _staged(path: Path, token: str) -> Path:
    return path.with_name(f".{path.name}.tmp-{token}")


def meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _described(path: Path, meta: dict) -> dict:
    return {"schema_version": SCHEMA_VERSION, "sha256": file_sha256(path), "size": path.stat().st_size, **meta}


def _json(meta: dict) -> bytes:
    return _utf8(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # bytes of a path that are not in the user's encoding


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path, known: dict | None = None) -> dict:
    """Name, size, modification time and sha256 of a file. Only if one of the others differs from `known` is it hashed.

    Within a process a file is hashed once while it stays the same.
    """
    status = path.stat()
    found = {"file": path.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if known and found.items() <= known.items():
        return {**found, "sha256": known["sha256"]}
    return {**found, "sha256": _sha256_of_version(path.resolve(), status.st_size, status.st_mtime_ns)}


@cache
def _sha256_of_version(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
