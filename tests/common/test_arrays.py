"""Array files with damaged or hostile headers: none is loaded, and none runs code or fills the memory."""

import io
import os
import pickle

import numpy as np
import pytest

from common.arrays import open_array


def with_header(shape: str, descr: str = "'<f4'", content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + content


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros(3))
    return file.getvalue()


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


DAMAGED = {
    "empty": b"", "text": b"0.5,1\n", "zeros": bytes(500), "pickle": pickle.dumps([1.5]), "archive": archive(),
    "objects": saved(np.array([{}], dtype=object)), "object header": with_header("(2,)", "'|O'", bytes(16)),
    "truncated": saved(np.ones((4, 2), np.float32))[:-1], "too long": saved(np.ones((4, 2), np.float32)) + b"1",
    "many rows": with_header("(999999999999, 999999999)"), "30 digits": with_header(f"({'9' * 30},)"),
    "negative": with_header("(-4, -2)", content=bytes(32)), "fraction": with_header("(4.5, 2)", content=bytes(36)),
    "no tuple": with_header("4"), "nested": with_header("(" * 400 + ")" * 400), "not closed": with_header("((("),
    "unknown type": with_header("(4,)", "'zz'"), "list as type": with_header("(4,)", "['a']"),
    "unknown version": with_header("(4,)", version=b"\x09\x00", content=bytes(16)),
    "long header": b"\x93NUMPY\x02\x00" + (200_000).to_bytes(4, "little") + b"{" + b" " * 199_999,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_array_is_a_value_error(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (each damage has its own words)
        open_array(tmp_path / "a.npy")
    assert "allow_pickle" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_named_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(OSError, match="named pipe"):
        open_array(tmp_path / "a.npy")


@pytest.mark.parametrize("array", [
    np.arange(6, dtype=np.float32).reshape(3, 2), np.asfortranarray(np.arange(6, dtype=np.int32).reshape(3, 2)),
    np.array([True, False]), np.empty((3, 0), np.float32), np.array(1.5)], ids=str)
def test_a_valid_array_is_read_as_it_was_written(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found = open_array(tmp_path / "a.npy")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
