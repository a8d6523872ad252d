"""Locks for files and folders. When a process ends, the operating system releases its locks."""

import logging
import os
import socket
from pathlib import Path

from common.errors import ConfigError, LockedError, naming

try:
    import fcntl
except ImportError:  # Windows, for example, has no fcntl
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


def lock(descriptor: int, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed.

    Returns True if the file is now locked, False if another process has locked it, and None if the system does not
    support locks. With `wait`, the function waits for the other process instead of returning False.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support locks
        return None
    return True


class FolderLock:
    """A lock on a folder until the end of the `with` block, or until the process ends.

    If another process has locked the folder, the constructor raises LockedError. With `wait`, it waits instead.
    """

    def __init__(self, folder: Path, wait: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ".lock"
        if self.path.exists() and not self.path.is_file():  # to open a named pipe might take forever
            raise ConfigError(self.path, "is not a regular file", fix="remove it")
        self.file = self.path.open("a+")
        locked = lock(self.file.fileno(), wait)
        if locked is None:
            log.warning("%s: the file system does not support locks, so nothing prevents a second run on this folder. "
                        "Do not run two commands on it at the same time", folder)
        elif not locked:
            self.file.seek(0)
            holder = self.file.read().strip() or "an unknown process"
            self.file.close()
            raise LockedError(folder, f"is in use by {holder}", fix="wait until that process ends, or stop it")
        with naming(self.path):
            self.file.truncate(0)
            os.write(self.file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()
