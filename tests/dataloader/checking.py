"""Runs --check for the tests, and tells what it found and whether it wrote anything."""

import logging
from pathlib import Path

import pytest

from common.artifacts import DatasetFolder
from common.errors import ArtifactError, DataError, UserError
from dataloader import process
from tests.dataloader.helpers import process_options as make_options

# Three users with four events each at the times 0 to 3, five items.
EVENTS = [(user, item, time) for user, items in (("a", "vwxy"), ("b", "wxyz"), ("c", "xyzv"))
          for time, item in enumerate(items)]


def check(folder: DatasetFolder, *flags: str) -> None:
    process.check(make_options(folder.data_root, "--check", *flags))


def refused(folder: DatasetFolder, kind: type[UserError], caplog, *flags: str) -> list[str]:
    """The findings of a check that fails with this kind of error, each without the folder's path."""
    before = state(folder)
    with pytest.raises(kind) as error:
        check(folder, *flags)
    assert error.value.exit_code == {DataError: 3, ArtifactError: 4}[kind]
    assert state(folder) == before
    found = [record.message.removeprefix("check: ") for record in caplog.records
             if record.levelno == logging.WARNING and record.message.startswith("check: ")]
    assert error.value.why == found[0]
    return [finding.replace(f"{folder.path}/", "") for finding in found]


def state(folder: DatasetFolder) -> dict[str, tuple]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else ()
            for path in folder.data_root.rglob("*")}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
