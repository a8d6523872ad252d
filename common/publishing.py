"""Atomic writes: a file or folder appears completely or not at all.

An artifact is published together with its meta file `<file>.meta.json`. A file or folder is first written under a
temporary name, `.<name>.tmp-<token>`, and then renamed. Before the rename, it is called staged. The writer locks the
staged file. A staged file without a lock is a leftover: its writer was killed.
"""

import errno
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
from common.errors import naming
from common.lock import lock
from common.reading import parse_json, read_text

SCHEMA_VERSION = 2
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system does not support the call
LARGE = 256 << 20  # bytes; the meta file of a larger file records the modification time, see `is_unchanged`
SECONDS_TO_ABANDON = 86_400  # without locks, a staged file that is older than this is a leftover


def publish(path: Path, write: Callable[[Path], None], meta: dict, size: int | None = None) -> dict:
    """Write the artifact `path` and its meta file, and return the content of the meta file.

    `write` is called with a temporary path, and must write the artifact to this path. A reader gets either both old
    files or both new files, even if this process is killed. If there are several processes, only the first one writes.

    size: the number of bytes of the artifact, if it is known; for the error of a full disk
    """
    # Both files are on the disk before the first rename. If the process dies between the two renames, the next reader
    # renames the staged meta file (`finish_publishing`).
    if not is_main():
        return {"schema_version": SCHEMA_VERSION, **meta}
    path.parent.mkdir(parents=True, exist_ok=True)
    token, described = secrets.token_hex(8), False
    staged, staged_meta = _staged(path, token), _staged(meta_path(path), token)
    # Lock the meta file, because `write` may replace the file `staged`.
    with _locked_stage(staged_meta, path, size=size):
        try:
            write(staged)
            meta = _complete_meta(staged, meta)
            staged_meta.write_bytes(_json(meta))
            described = True
            _set_mode(staged, staged_meta.stat().st_mode)  # safetensors makes its files readable only by their owner
            for file in (staged, staged_meta):
                _sync(file)
            os.replace(staged, path)
        except BaseException:
            # Otherwise the content was already renamed, and readers need the staged meta file.
            if staged.exists() or not described:
                staged.unlink(missing_ok=True)
                staged_meta.unlink(missing_ok=True)
            raise
        with suppress(FileNotFoundError):  # a reader has already completed the publishing
            os.replace(staged_meta, meta_path(path))
    _sync(path.parent)
    for name in (path.name, meta_path(path).name):
        sweep(path.parent, escape(name))
    return meta


def finish_publishing(path: Path) -> None:
    """Complete the publishing of `path` if its writer was killed.

    If the writer has renamed the content but not the meta file, this function renames the meta file.
    """
    prefix = f".{meta_path(path).name}.tmp-"
    # Ignore a meta file if its content is still staged too: the writer has not renamed the content yet.
    staged = [file for file in path.parent.glob(f"{escape(prefix)}*")
              if not _staged(path, file.name.removeprefix(prefix)).exists()]
    if not staged or not path.is_file():
        return
    sha256 = content_sha256(path)
    for candidate in staged:
        try:
            complete = parse_json(read_text(candidate))["sha256"] == sha256
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a writer is still writing this meta file, or a process has just renamed it
        if complete:
            with suppress(FileNotFoundError):  # the writer or another reader has just renamed it
                os.replace(candidate, meta_path(path))


def write_meta(path: Path, meta: dict) -> None:
    """Write a meta file for an existing file, for example a file that another program has made."""
    write_bytes(meta_path(path), _json(_complete_meta(path, meta)))


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file atomically. The file gets no meta file."""
    write_bytes(path, _utf8(text))


def write_bytes(path: Path, content: bytes, clean: bool = True, by_all: bool = False) -> None:
    """Write or replace a file atomically, and sync it to the disk.

    The file gets no meta file. If there are several processes, only the first one writes; with `by_all`, every process
    writes its own file. With `clean`, the temporary files of killed writers are removed; this lists the folder.
    """
    if not (by_all or is_main()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = _staged(path, secrets.token_hex(8))
    with _locked_stage(staged, path, size=len(content)):
        try:
            staged.write_bytes(content)
            _sync(staged)
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    _sync(path.parent)
    if clean:
        sweep(path.parent, escape(path.name))


def publish_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write or replace the folder `path`, completely or not at all.

    `write` is called with the path of an empty temporary folder, and must write the files to this folder.
    """
    token = secrets.token_hex(8)
    staged, old = _staged(path, token), path.with_name(f".{path.name}.old-{token}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_stage(staged, path, Path.mkdir):
        try:
            write(staged)
            for part in staged.rglob("*"):
                if part.is_file():
                    _set_mode(part, staged.stat().st_mode & 0o666)
                _sync(part)
            _sync(staged)
            if not path.exists():
                staged.rename(path)
            elif not _exchange(staged, path):
                path.rename(old)  # if this process is killed now, the folder is missing
                staged.rename(path)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    _sync(path.parent)
    for replaced in (staged, old):
        shutil.rmtree(replaced, ignore_errors=True)
    sweep(path.parent, escape(path.name))


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two files or folders in one step. Return False if the system cannot do this; then nothing changes."""
    import ctypes

    try:  # Python has no function for this system call
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def discard_folder(path: Path) -> None:
    """Delete a folder. It disappears at once, even if this process is killed before all its files are deleted."""
    if path.exists():
        old = path.with_name(f".{path.name}.old-{secrets.token_hex(8)}")
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path, pattern: str) -> None:
    """Remove the temporary files and folders that killed writers have left in `folder`.

    pattern: a glob pattern for the final names of these files and folders
    """
    for kind in ("tmp", "old"):
        for leftover in folder.glob(f".{pattern}.{kind}-*"):
            with _abandoned(leftover) as abandoned:
                if abandoned and leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                elif abandoned:
                    leftover.unlink(missing_ok=True)


@contextmanager
def _locked_stage(staged: Path, path: Path, make: Callable[[Path], None] = Path.touch,
                  size: int | None = None) -> Iterator[None]:
    """Create a staged file or folder, and lock it until the end of the `with` block.

    path, size: the final path, and the number of bytes if it is known, for errors
    """
    while True:
        make(staged)
        try:
            descriptor = os.open(staged, os.O_RDONLY if staged.is_dir() else os.O_RDWR)
        except FileNotFoundError:  # `sweep` in another process removed it before it was locked
            continue
        lock(descriptor, wait=True)
        if _is_at(descriptor, staged):
            break
        os.close(descriptor)
    try:
        with naming(path, size):
            yield
    finally:
        os.close(descriptor)


@contextmanager
def _abandoned(leftover: Path) -> Iterator[bool]:
    """Yield True if a temporary file or folder is a leftover (no writer has locked it), else False.

    This process locks a leftover until the end of the `with` block. If locks are not supported, a leftover is a file or
    folder that has not changed for `SECONDS_TO_ABANDON`.
    """
    name, token = leftover.name[1:].rsplit("-", 1)
    target = leftover.with_name(name.rsplit(".", 1)[0])
    locked_files = (_staged(meta_path(target), token), _staged(target, token))
    try:
        changed = leftover.stat().st_mtime
        descriptor = os.open(next(filter(Path.exists, locked_files), leftover), os.O_RDONLY)
    except OSError:  # the writer has just renamed it, or it belongs to another user
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
    """Return the path of an artifact's meta file."""
    return path.with_name(path.name + ".meta.json")


def _complete_meta(path: Path, meta: dict) -> dict:
    """Add the schema version, and the sha256 and the size of the file `path`, to `meta`."""
    status = path.stat()
    large = {"mtime_ns": status.st_mtime_ns} if status.st_size > LARGE else {}
    return {"schema_version": SCHEMA_VERSION, "sha256": content_sha256(path), "size": status.st_size, **large, **meta}


def _json(meta: dict) -> bytes:
    return _utf8(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # a path may contain bytes outside the user's encoding


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """Like `file_sha256`, but one process reads the same version of a file only once."""
    status = path.stat()
    return _sha256_of_version(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@cache
def _sha256_of_version(path: Path, *version: int) -> str:
    return file_sha256(path)


def is_unchanged(path: Path, meta: dict) -> bool:
    """Return whether the meta file of a large file records the current size and modification time of the file.

    The meta files of other files do not record the time. Their content must be compared instead.
    """
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (meta["size"], meta.get("mtime_ns"))


def fingerprint(path: Path, known: dict | None = None) -> dict:
    """Return the name, size, modification time and sha256 of a file.

    `known` is an earlier fingerprint of the file. If the name, size and modification time are still the same, the file
    is not read, and the sha256 is taken from `known`.
    """
    status = path.stat()
    found = {"file": path.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if known and found.items() <= known.items():
        return {**found, "sha256": known["sha256"]}
    return {**found, "sha256": content_sha256(path)}


def _set_mode(path: Path, mode: int) -> None:
    """Set the mode (permissions) of a file. Do nothing if the file system does not support modes."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise


def _sync(path: Path) -> None:
    """Sync a file or a folder to the disk. Do nothing if the file system does not support this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)
