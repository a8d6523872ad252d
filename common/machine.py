"""Errors of the machine: the memory, the disk, the file system and the installed packages."""

import errno
import shutil
import sys
from pathlib import Path

from common.errors import NO_MEMORY, ConfigError, ResourceError, UserError, out_of_memory

try:
    import resource
except ImportError:  # Windows, for example, has no resource limits
    resource = None  # type: ignore[assignment]

MINIMUM = 5 * 2**28  # bytes of virtual memory for PyTorch, DuckDB and their threads
PACKAGES = ("common", "dataloader", "quantization", "recommendation")
FULL_DISK = ("ENOSPC", "EDQUOT")
ELSEWHERE = "use a folder on another file system, for example with --data_root or --run_root"
# For errors of the operating system: the exception, the fix, and the names of the errors
FIXES = (
    (ResourceError, "free some disk space and run the same command again", FULL_DISK),
    (ResourceError, f"raise the limit for the size of files (ulimit -f), or {ELSEWHERE}", ("EFBIG",)),
    (ResourceError, "raise the limit for the number of open files (ulimit -n)", ("EMFILE", "ENFILE")),
    (ResourceError, "close other programs, or raise the limit for the number of processes (ulimit -u)", ("EAGAIN",)),
    (ResourceError, f"check the disk or the network file system, or {ELSEWHERE}",
     ("EIO", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EREMOTEIO", "EHOSTDOWN", "ENOLINK", "EUCLEAN")),
    (ConfigError, "check the path and its permissions", ("EACCES", "EPERM")),
    (ConfigError, "check the path",
     ("ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ELOOP", "ENAMETOOLONG")),
    (ConfigError, ELSEWHERE,
     ("EROFS", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "ENOLCK", "EXDEV", "ENOTTY", "EMLINK")))


def machine_error(error: BaseException) -> UserError | None:
    """Return a UserError with a fix for an error of the machine, for example for a full disk.

    Returns None if `error` is not an error of the machine.
    """
    if out_of_memory(error):
        return ResourceError("memory", "not enough memory", _reason(error), _memory_fix())
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(sys.executable, f"the package {error.name!r} is not installed", fix=environment_hint())
    if isinstance(error, ImportError) and error.name and error.name.partition(".")[0] not in PACKAGES:
        return ConfigError(sys.executable, f"the package {error.name.partition('.')[0]!r} cannot be loaded",
                           _reason(error), f"install it again, or {environment_hint()}")
    if not isinstance(error, OSError):
        return None
    what, name = error.strerror or str(error), errno.errorcode.get(error.errno or 0)
    where = error.filename2 or error.filename or ("disk" if name in FULL_DISK else "system")
    for kind, fix, names in FIXES:
        if name in names:
            return kind(where, what, _space(error) if name == "ENOSPC" else "", fix)
    return ConfigError(where, what, fix="run the same command with --debug to see which call failed")


def _space(error: OSError) -> str:
    """Return a text with the number of bytes that are needed (if known) and free, for the error of a full disk."""
    return "; ".join([*getattr(error, "__notes__", ()), *free_space(error.filename2 or error.filename)])


def free_space(path: str | Path | None) -> list[str]:
    """Return a text with the number of bytes that this user can write to the disk of `path`.

    Returns an empty list if the number is unknown.
    """
    if path is None:
        return []
    try:  # a parent folder may not be readable
        folder = next(part for part in (Path(path).absolute(), *Path(path).absolute().parents) if part.exists())
        return [f"{shutil.disk_usage(folder).free:,} bytes are free"]
    except OSError:
        return []


def _reason(error: BaseException) -> str:
    """Return the line of the error's message that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if any(words in line for words in NO_MEMORY)), lines[0] if lines else "")[:300]


def require_memory() -> None:
    """Raise ResourceError if the memory limit of this process is too low for the libraries.

    With too little memory for a thread, a library may hang, or end the process without an error.
    """
    if (limit := _memory_limit()) is not None and limit < MINIMUM:
        raise ResourceError("memory", f"the limit for this process is {limit // 2**20} MB",
                            f"The libraries need at least {MINIMUM // 2**20} MB, even for small data",
                            "raise the limit, for example with: ulimit -v unlimited")


def _memory_limit() -> int | None:
    """Return the limit of `ulimit -v` in bytes, or None if there is no limit."""
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if resource is None or limit == resource.RLIM_INFINITY else limit


def _memory_fix() -> str:
    fix = "use a smaller batch_size or a machine with more memory"
    limit = _memory_limit()
    return fix if limit is None else f"raise the limit of {limit // 2**20} MB for this process (ulimit -v), {fix}"


def environment_hint() -> str:
    """Return the command that installs the packages of this project or activates its environment."""
    root = Path(__file__).resolve().parents[1]
    activate = root / ".venv" / "bin" / "activate"
    # If .venv is already active, a package is missing in it. Then setup.sh installs the package.
    found = activate.exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve()
    return f"source {activate if found else root / 'setup.sh'}"
