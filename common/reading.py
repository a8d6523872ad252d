"""Readers for files that may be damaged or hostile: regular files only, and values of the expected types."""

import json
import math
import re
import reprlib  # its repr is short, also for values that are nested deeply
import stat
from collections import Counter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from common.errors import ArtifactError

FILE_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
              stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
WHY = "The file is damaged, or another version of the code has written it"
MAX_DIGITS = 4_300  # the limit of Python, checked here because its own error advises raising it
MAX_SHOWN = 80  # an error message shows at most this many characters of the message of a library
MAX_NAME = 255  # bytes in the name of a file
MAX_INTEGER = 2**63 - 1  # a larger integer has no meaning in our files, and arrays and floats cannot hold it
# Types with a smallest and a largest value, for `fits`.
COUNT = Annotated[int, 0, MAX_INTEGER]
AMOUNT = Annotated[float, 0, math.inf]
SHARE = Annotated[float, 0, 1]


class DuplicateKey(ValueError):
    """A JSON object has a key twice."""

    def __init__(self, key: str):
        self.key = key
        super().__init__(f"The key {shortened(key)!r} occurs twice")


def require_regular(path: Path) -> None:
    """Raise OSError if the path is not a regular file. For example, a read from a named pipe might wait forever.

    /dev/stdin, and the path that a shell passes for `<(command)`, are allowed.
    """
    mode = path.stat().st_mode
    of_shell = path == Path("/dev/stdin") or path.parent == Path("/dev/fd")
    if not (stat.S_ISREG(mode) or (of_shell and stat.S_ISFIFO(mode))):
        raise OSError(f"The path is {FILE_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file")


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file.

    Raises OSError if the file cannot be read or is not a regular file. Raises ValueError if it is not UTF-8.
    """
    require_regular(path)
    return path.read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError if the text is not valid JSON, or if an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("The JSON value is nested too deeply") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DuplicateKey(key)
    return entries


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"A number has {len(digits)} digits")
    return int(digits)


class Record(dict):
    """The values of a file. If a key is missing, `record[key]` raises ArtifactError.

    path: the file
    fix: how to make the file again
    """

    def __init__(self, values: dict, path: Path, fix: str):
        super().__init__(values)
        self.path, self.fix = path, fix

    def __missing__(self, key: str):
        raise ArtifactError(self.path, f"has no key {key!r}", WHY, self.fix)

    def check(self, required: dict[str, Any], optional: dict[str, Any]) -> None:
        """Raise ArtifactError if a required key is missing, or if a value has another type.

        required, optional: key -> type, see `fits`. Keys that are in neither dict are not checked.
        """
        for key, kind in {**optional, **required}.items():
            if (key in self or key in required) and not fits(self[key], kind):
                raise ArtifactError(self.path, f"{key} must be of type {kind_name(kind)}, got "
                                    f"{reprlib.repr(self[key])}", WHY, self.fix)


def read_record(path: Path, fix: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> Record:
    """Return the content of a JSON file that must contain an object.

    required, optional: key -> type of its value, see `Record.check`

    Raises ArtifactError if the file cannot be read, a required key is missing, or a value has another type.
    """
    try:
        content = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ArtifactError(path, "cannot be read", shortened(str(error)), fix) from error
    if not isinstance(content, dict):
        raise ArtifactError(path, f"must contain a JSON object, got {reprlib.repr(content)}", fix=fix)
    record = Record(content, path, fix)
    record.check(required, optional or {})
    return record


def fits(value: object, kind: Any) -> bool:
    """Return whether a value has a type such as `int`, `list[int]`, `dict[str, str]`, `str | None` or a TypedDict.

    An integer is also a float. A bool is neither an integer nor a float. An integer must have at most 64 bits, and a
    float must be finite. `tuple[int, str]` is a list of two entries with these types. `Annotated[int, 0, 9]` is an
    integer from 0 to 9. A value that must have a TypedDict type may have further keys.
    """
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        number, low, high = parts
        return fits(value, number) and low <= value <= high  # type: ignore[operator]  # a number, as it fits
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(entry, parts[0]) for entry in value)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(fits, value, parts))
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            fits(key, parts[0]) and fits(entry, parts[1]) for key, entry in value.items())
    if is_typeddict(kind):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], part)
            for key, part in get_type_hints(kind, include_extras=True).items())
    if kind in (int, float):
        return type(value) in (int, kind) and is_usable(value)
    return type(value) is kind


def is_usable(value: object) -> bool:
    """Return False for a float that is not finite and for an integer of more than 64 bits, else True."""
    if type(value) is int:
        return -MAX_INTEGER <= value <= MAX_INTEGER
    return not isinstance(value, float) or math.isfinite(value)


def is_file_name(name: str) -> bool:
    """Return whether a text is the name of a file in a folder, and not a path, `..`, or a name that is too long."""
    return name.isprintable() and "/" not in name and name not in ("", ".", "..") and len(name.encode()) <= MAX_NAME


def shortened(text: str) -> str:
    """Return the first line of a text, and at most `MAX_SHOWN` of its characters."""
    line = next(iter(text.splitlines()), "")
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"


def kind_name(kind: Any) -> str:
    """Return the name of a type for error messages, for example `int`, `list[int]` or `int from 0 to 9`."""
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    text = re.sub(r"\b[a-z_]+\.", "", str(kind))
    text = re.sub(r"Annotated\[(\w+), (\w+), (\w+)\]", r"\1 from \2 to \3", text)
    return re.sub(r"Optional\[(.*)\]", r"\1 | None", text)
