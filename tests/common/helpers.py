"""Writes and damages artifacts for the tests, and checks parts of messages."""

import re
from pathlib import Path

import pytest

from common.publishing import publish


def put(path: Path, content: bytes, **meta) -> dict:
    return publish(path, lambda staged: staged.write_bytes(content), {"inputs": {}, "command": f"make {path.name}",
                                                                      **meta})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def numbers(raised: pytest.ExceptionInfo) -> set[str]:
    """The numbers that an error tells, without those in its place and in its fix."""
    text = str(raised.value).removeprefix(str(raised.value.where)).rpartition("Fix: ")[0]
    return set(re.findall(r"-?\b\d+(?:\.\d+)?", text))


def assert_interrupted(err: str, names_force: bool = False) -> None:
    """One error line with a fix. It names --force only if the command had it."""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert " Fix: " in err
    assert ("--force" in err) == names_force
