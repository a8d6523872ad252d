"""Runs --check for the tests and returns its findings; fails if the check writes anything."""

import logging
from pathlib import Path
from typing import NamedTuple

from common.artifacts import DatasetFolder
from common.errors import DataError, UserError
from dataloader import process
from tests.dataloader.helpers import mentions
from tests.dataloader.helpers import process_options as make_options
from tests.errors import refused

# Three users with four events each at the times 0 to 3, five items.
EVENTS = [(user, item, time) for user, items in (("a", "vwxy"), ("b", "wxyz"), ("c", "xyzv"))
          for time, item in enumerate(items)]


class Finding(NamedTuple):
    """A logged finding: the name of the file, and the text about it."""

    file: str
    text: str


def check(folder: DatasetFolder, *flags: str) -> None:
    process.check(make_options(folder.data_root, "--check", *flags))


def findings(folder: DatasetFolder, kind: type[UserError], caplog, *flags: str) -> list[Finding]:
    """Run a check that must fail with this kind of error; the error names the folder and the first finding."""
    before, start = state(folder), len(caplog.records)
    made = folder.source_flags.exists() or (folder.path / "raw").exists()
    again = f"{folder.make_command} --force"  # not for files that a user has made
    with refused(kind, folder.path, fix=["--check --adopt" if kind is not DataError else "repair"]) as raised:
        check(folder, *flags)
    assert (again in raised.value.fix) == (kind is DataError and made)
    assert state(folder) == before
    lines = [record.getMessage().partition(f"{folder.path}/")[2] for record in caplog.records[start:]
             if record.levelno == logging.WARNING]
    found = [Finding(*line.split(": ", 1)) for line in lines if line]
    assert f"{found[0].file}: {found[0].text}" in str(raised.value)
    return found


def check_finds(folder: DatasetFolder, kind: type[UserError], caplog, *expected: tuple, flags: tuple = ()) -> None:
    """The check fails with exactly these findings, in order: each a file's name and the values in the text."""
    found = findings(folder, kind, caplog, *flags)
    assert [finding.file for finding in found] == [file for file, *_ in expected], found
    assert all(mentions(finding.text, *values) for finding, (_, *values) in zip(found, expected, strict=True)), found


def state(folder: DatasetFolder) -> dict[str, tuple]:
    """The bytes and the time of change of every file; an empty entry for a folder."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else ()
            for path in folder.data_root.rglob("*")}


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
