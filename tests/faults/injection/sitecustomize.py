"""Injects a fault into a command. Python imports this module at its start if this folder is on PYTHONPATH.

The environment variable FAULT is a JSON object. All of its keys are optional:

at: number of the operation at which the fault happens, counted from 1
do: what happens there. "kill", "term", "int" and "stop": the process sends itself this signal before the operation.
    "full": the disk has no space for the operation. The name of an error such as "EACCES": the operation raises it.
log: a file outside the current folder; the name and the path of each operation are appended to it
file_size, memory: the largest size of a file, and of the memory of the process, in bytes
clock: seconds by which the clock jumps after its first use

An operation is a call that creates, syncs, renames or removes a file or folder below the current folder. Between two
operations, the names and the synced contents of the files do not change.
"""

import builtins
import errno
import io
import json
import os
import resource
import signal
import time
from collections.abc import Callable

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}
FULL = "/dev/full"  # a file to which no byte can be written
CREATES = os.O_CREAT | os.O_TRUNC


class Fault:
    """Counts the operations, and makes the fault happen at one of them."""

    def __init__(self, at: int = 0, do: str = "", log: str = ""):
        self.at, self.do, self.log = at, do, log
        self.root, self.count, self.open = os.path.realpath(os.getcwd()) + os.sep, 0, io.open

    def is_due(self, operation: str, path: object) -> bool:
        """Count an operation on a path, and return whether it must fail. A signal is sent here."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self.root) or operation == "mkdir" and os.path.isdir(name):
            return False
        self.count += 1
        if self.log:
            with self.open(self.log, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{operation} {name.removeprefix(self.root)}\n")
        if self.count == self.at and self.do in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.do])
        return self.count == self.at and self.do not in SIGNALS

    def error(self, *path: object) -> OSError:
        number = errno.ENOSPC if self.do == "full" else getattr(errno, self.do)
        return OSError(number, os.strerror(number), *path)

    def wrap(self, operation: str, call: Callable) -> Callable:
        def wrapped(path, *rest, **options):
            # A path relative to an open folder is used only to remove whole folders.
            if "dir_fd" not in options and self.is_due(operation, path):
                raise self.error(path)
            return call(path, *rest, **options)
        return wrapped

    def wrap_sync(self, call: Callable) -> Callable:
        def fsync(file):
            if self.is_due("fsync", _path_of(file)):
                raise self.error()  # the real error has no path either
            return call(file)
        return fsync

    def wrap_open(self, call: Callable) -> Callable:
        def opened(path, mode="r", *rest, **options):
            if set(mode) & set("wax+") and self.is_due("open", path):
                if self.do != "full" or "+" in mode or not os.path.exists(FULL):
                    raise self.error(path)
                call(path, mode, *rest, **options).close()  # a full disk often has room for an empty file
                return call(FULL, mode.replace("x", "w"), *rest, **options)
            return call(path, mode, *rest, **options)
        return opened

    def wrap_low_open(self, call: Callable) -> Callable:
        def opened(path, flags, *rest, **options):
            if flags & CREATES and "dir_fd" not in options and self.is_due("create", path):
                raise self.error(path)
            return call(path, flags, *rest, **options)
        return opened

    def install(self) -> None:
        for name in ("replace", "rename", "unlink", "remove", "mkdir"):
            setattr(os, name, self.wrap(name, getattr(os, name)))
        os.fsync, os.open = self.wrap_sync(os.fsync), self.wrap_low_open(os.open)
        builtins.open = io.open = self.wrap_open(io.open)


def _path_of(file: object) -> str | None:
    """Return the path of an open file, or None if the system cannot tell it."""
    number = file if isinstance(file, int) else file.fileno()  # type: ignore[attr-defined]
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        pass
    try:
        import fcntl

        return os.fsdecode(fcntl.fcntl(number, 50, bytes(1024)).rstrip(b"\0"))  # F_GETPATH of macOS
    except OSError:
        return None


def install(settings: dict) -> None:
    """Install the fault that `settings` describes (see the docstring of the module) in this process."""
    for key, limit in (("file_size", resource.RLIMIT_FSIZE), ("memory", resource.RLIMIT_AS)):
        if key in settings:
            resource.setrlimit(limit, (settings[key], resource.getrlimit(limit)[1]))
    if "clock" in settings:
        now, calls = time.time, []
        time.time = lambda: now() + (settings["clock"] if calls or calls.append(1) else 0)
    Fault(settings.get("at", 0), settings.get("do", ""), settings.get("log", "")).install()


if __name__ == "sitecustomize" and "FAULT" in os.environ:
    install(json.loads(os.environ["FAULT"]))
