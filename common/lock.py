"""Locks that end with their process: of an open file, and of a folder."""

import logging
import os
import socket
from pathlib import Path

from common.errors import LockedError

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


def lock(descriptor: int, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed: False if another holds it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # this file system has none
        return None
    return True


class FolderLock:
    """Holds a folder for this process; a second one gets LockedError naming the holder, or waits (`wait`)."""

    def __init__(self, folder: Path, wait: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ".lock"
        self.file = self.path.open("a+")
        locked = lock(self.file.fileno(), wait)
        if locked is None:
            log.warning("%s: there are no locks here; do not run two commands at once in this folder", folder)
        elif not locked:
            self.file.seek(0)
            holder = self.file.read().strip() or "an unknown process"
            self.file.close()
            raise LockedError(folder, f"is in use by {holder}", fix="wait for it, or stop it")
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()
