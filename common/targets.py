"""Output files that the user names: a check that protects existing files, and a function that writes them."""

import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from common.errors import ConfigError, naming
from common.output import show
from common.publishing import meta_path, write_text

MAX_LINE = 1_000_000  # bytes of the first line that are read
# Names that this program uses in the folders of datasets and runs. All files in a folder of `FOLDERS` are its own.
FILES = re.compile(r"(interactions|items|users|images)\.parquet|.*\.(emb|mask|codes)-.*\.npy|.*\.meta\.json|"
                   r"source\.yaml|bad_lines\.jsonl|config\.yaml|run\.log|(metrics|predictions)\.jsonl|"
                   r"(metrics|times|finished|evaluation|not_finite|seeds)\.json|latest|compare\.(md|csv)|report\.md|"
                   r"explain\.html|card\.md|\.lock|\.work|\..*\.(tmp|old)-.*|.*\.safetensors", re.IGNORECASE)
FOLDERS = {"raw", "images", "checkpoints", ".models", ".embeddings", ".work"}
OWN = "has a name that this program uses in the folders of datasets and runs"


def check_target(flag: str, path: Path, roots: Iterable[Path], could_have_written: Callable[[str], object]) -> None:
    """Raise ConfigError if writing the file `path` would overwrite a file that `flag` has not written.

    flag: the flag that names the file, for the error
    roots: the folders with the datasets and the runs
    could_have_written: takes the first line of an existing file; the result is true if `flag` could have written it

    Pipes, character devices, empty files and /dev/stdout are allowed.
    """
    if _standard_stream(path) is not None:
        return
    parent = next((folder for folder in path.absolute().parents if folder.exists()), path.parent)
    what, fix = _what_it_is(path), "choose another path"
    if not parent.is_dir():
        what = f"cannot be written: {parent} is not a folder"
    if what is None and _has_own_name(_resolved(path), [root.resolve() for root in roots]):
        what = OWN
    foreign = path.is_file() and path.stat().st_size and not could_have_written(_first_line(path))
    if what is None and foreign:
        what, fix = f"already exists and was not written by {flag}", f"{fix}, or move this file to another place"
    if what is not None:
        raise ConfigError(f"{flag} {path}", what, fix=fix)


def check_targets(flag: str, folder: Path, roots: Iterable[Path], first: str, others: Iterable[str],
                  could_have_written: Callable[[str], object]) -> None:
    """Raise ConfigError if writing files to `folder` would overwrite files that `flag` has not written.

    first: the name of the file that is written first; it must exist if any of the files exists
    others: the names of the other files
    could_have_written: as in `check_target`, for the file `first`
    """
    roots, target = [*roots], folder / first
    # Other programs write files of the same form as `others`. The file `first` shows that this program wrote them.
    checks = {target: could_have_written, **{folder / name: lambda line: target.exists() for name in others}}
    for path, check in checks.items():
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ConfigError(f"{flag} {path}", "is not a regular file", fix="choose another folder")
        check_target(flag, path, roots, check)


def check_new_folder(flag: str, folder: Path, roots: Iterable[Path]) -> None:
    """Raise ConfigError if a folder has the name of a folder that this program makes for a dataset or a run."""
    if _has_own_name(_resolved(folder) / "file", [root.resolve() for root in roots]):
        raise ConfigError(f"{flag} {folder}", OWN, fix="choose another folder")


def _what_it_is(path: Path) -> str | None:
    """Return the reason why a file of this kind cannot be replaced, or None."""
    if path.is_dir():
        return "is a folder"
    if path.is_block_device() or path.is_socket():
        return "is a disk or a socket"
    if meta_path(path).exists() or meta_path(_resolved(path)).exists():
        return "is an artifact that other commands read"
    return None


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve would raise RuntimeError for a link to itself


def _has_own_name(path: Path, roots: list[Path]) -> bool:
    inside = [path.relative_to(root) for root in roots if path.is_relative_to(root)]
    return any(FILES.fullmatch(path.name) or FOLDERS & set(part.parts[:-1]) for part in inside)


def _first_line(path: Path) -> str:
    """Return the first line of a file without its line break, or the beginning of the file if it has no line break."""
    with path.open("rb") as file:
        return file.readline(MAX_LINE).decode("utf-8", "replace").rstrip("\n")


def _standard_stream(path: Path) -> TextIO | None:
    """Return standard output or standard error if `path` is a name of it, such as /dev/stdout, else None."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # no such file, or a stream without a descriptor
            if path.is_symlink() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
    return None


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file. If the last line of the file has no line break, add it first."""
    with naming(path):
        ended = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{'' if ended else chr(10)}{line}\n")


def write_target(path: Path, text: str) -> None:
    """Write a text to a file that `check_target` allows. Pipes, devices and links are not replaced."""
    if (stream := _standard_stream(path)) is not None:  # another descriptor would overwrite its text
        show(text, stream, end="")
        return
    if not path.is_symlink() and (path.is_file() or not path.exists()):
        write_text(path, text)
        return
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # a rename would replace the device
            file.write(text)
    except OSError as error:
        error.filename = str(path)
        raise
