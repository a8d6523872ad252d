"""Writes and damages artifacts for the tests."""

from pathlib import Path

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
