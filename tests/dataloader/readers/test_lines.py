"""Files of one record per line: line numbers, damaged files, and Python literals rewritten as JSON."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import pytest

from common.errors import ResourceError
from dataloader.readers import lines
from dataloader.readers.lines import MAX_LINE, DamagedError, numbered_lines, rewrite, verifying
from tests.dataloader.helpers import mentions
from tests.errors import refused

ROOT = Path(__file__).resolve().parents[3]
PACKED = pytest.mark.parametrize("ending", ["", ".gz"])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@PACKED
@pytest.mark.parametrize(("content", "expected"), [
    (b"", []),
    (b"\n \n\t\r\n", []),
    (b"a\nb", [(1, b"a"), (2, b"b")]),
    (b"a\n\n  \nb\r\n\nc\n", [(1, b"a"), (4, b"b\r"), (6, b"c")]),
    ("a\u2028\x85\x0b\x1c\rb\nc\n".encode(), [(1, "a\u2028\x85\x0b\x1c\rb".encode()), (2, b"c")]),
])
@pytest.mark.parametrize("block", [1, 3, 4 << 20])
def test_line_numbers_count_blank_lines(tmp_path, monkeypatch, ending, content, expected, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    assert list(numbered_lines(write(tmp_path / f"x{ending}", content))) == expected


def test_a_gzip_file_may_have_several_members(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n") + b"\0" * 50)
    assert list(numbered_lines(path)) == [(1, b"a"), (2, b"bc"), (3, b"d")]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 8, 9, 1000, 10_000])
def test_a_truncated_file_is_named_with_its_last_line(tmp_path, cut):
    content = "".join(f"{n * 7919 % 100_003}\n" for n in range(12_000)).encode()
    path = write(tmp_path / "x.gz", content)
    path.write_bytes(path.read_bytes()[:-cut])
    with refused(DamagedError) as error:
        list(numbered_lines(path))
    file, _, line = str(error.value.where).rpartition(":")
    assert file == str(path)
    line = int(line)
    with gzip.open(path) as file:  # the readable bytes, one by one
        readable = b""
        try:
            while byte := file.read1(1):
                readable += byte
        except EOFError:
            pass
    # Some readable bytes at the end are lost, because they come in small blocks.
    assert readable.count(b"\n") - 1000 < line <= readable.count(b"\n") + 1
    assert mentions(error.value.why, line - 1)


def test_the_content_says_whether_a_file_is_gzipped(tmp_path):
    (tmp_path / "x.gz").write_bytes(b"a\nb")
    (tmp_path / "x").write_bytes(gzip.compress(b"a\nb"))
    assert list(numbered_lines(tmp_path / "x.gz")) == list(numbered_lines(tmp_path / "x")) == [(1, b"a"), (2, b"b")]


def test_a_wrong_checksum_after_many_blocks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 1000)
    packed = bytearray(gzip.compress(b"a line\n" * 1000, compresslevel=0))
    packed[3000] ^= 1
    (tmp_path / "x.gz").write_bytes(packed)
    with refused(DamagedError, f"{tmp_path}/x.gz:1001"), verifying(tmp_path / "x.gz"):
        pass
    (tmp_path / "x.gz").write_bytes(packed[:2000])
    with refused(DamagedError), verifying(tmp_path / "x.gz"):
        pass


MORE = gzip.compress(b"more", mtime=0)


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize(("end", "is_valid"), [
    (b"", True), (b"\0" * 20, True), (b"\0" * 9 + MORE, True), (b"\0\0x", False), (MORE[:-1], False),
    (MORE[:9], False)])
def test_members_and_zeros_may_follow_each_other(tmp_path, monkeypatch, block, end, is_valid):
    monkeypatch.setattr(lines, "PACKED_BLOCK", block)
    monkeypatch.setattr(lines, "CHECKED", 1000)
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"\0" * 100_000) + end)
    with nullcontext() if is_valid else refused(DamagedError), verifying(tmp_path / "x.gz"):
        pass
    if is_valid:  # Python's own reader agrees
        assert gzip.decompress((tmp_path / "x.gz").read_bytes()).strip(b"\0") in (b"", b"more")


@pytest.mark.slow
@PACKED
def test_a_huge_line_does_not_fill_the_memory(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    with gzip.open(path, "wb", compresslevel=1) if ending else path.open("wb") as file:
        file.write(b"a\n")
        for _ in range(250):
            file.write(b"x" * (1 << 20))
        file.write(b"\nb\n")
    tracemalloc.start()
    found = [(number, len(line)) for number, line in numbered_lines(path)]
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [number for number, _length in found] == [1, 2, 3]
    assert MAX_LINE < found[1][1] < 2 * MAX_LINE
    assert peak < 200 << 20


def test_literals_become_one_line_of_json_each(tmp_path):
    path = write(tmp_path / "x.gz", b"{'a': 'it\\'s'}\n\n  \n{'a': '\\a'}\r\nno record\n{'b': None}")
    rewrite(path, tmp_path / "y", "python")
    assert (tmp_path / "y").read_bytes() == b'{"a": "it\'s"}\n{}\nno record\n{"b": null}\n'


@pytest.mark.slow
def test_json_stays_the_same_except_blank_and_huge_lines(tmp_path):
    path = write(tmp_path / "x", b'{"a": "\\u00e9"}\n\n{"a": "' + b"x" * MAX_LINE + b'"}\n{"a":\n')
    rewrite(path, tmp_path / "y", "json")
    assert (tmp_path / "y").read_bytes() == b'{"a": "\\u00e9"}\n{}\n{"a":\n'


def many_literals(path: Path) -> Path:
    records = [repr({"id": n, "text": f"it's number {n * 7919 % 10_007}"}) for n in range(20_000)]
    return write(path, "\n".join(records).encode())


@pytest.mark.slow
def test_several_processes_keep_the_order_of_lines(tmp_path, monkeypatch):
    path = many_literals(tmp_path / "x.gz")
    monkeypatch.setattr(lines, "BLOCK", 30_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2}, raising=False)
    rewrite(path, tmp_path / "several", "python")
    records = [json.loads(line) for line in (tmp_path / "several").read_text().splitlines()]
    assert records == [{"id": n, "text": f"it's number {n * 7919 % 10_007}"} for n in range(20_000)]


def test_a_killed_worker_means_a_lack_of_memory(tmp_path, monkeypatch):
    path = many_literals(tmp_path / "x.gz")
    monkeypatch.setattr(lines, "BLOCK", 30_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1}, raising=False)
    monkeypatch.setattr(lines, "_rewrite_block", _kill_oneself)
    with refused(ResourceError, "memory"):
        rewrite(path, tmp_path / "y", "python")


def _kill_oneself(*_task) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are counted in /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    many_literals(tmp_path / "x.gz")
    script = tmp_path / "run.py"
    script.write_text("""
import os, sys
from contextlib import nullcontext
from pathlib import Path
from dataloader.readers import lines

def work(*task):
    Path(sys.argv[1], str(os.getpid())).touch()
    return b""

if __name__ == "__main__":
    lines.BLOCK = 30_000
    os.sched_getaffinity = lambda _pid: {0, 1}
    lines._rewrite_block = work
    for _ in lines._in_processes(10**9, ((b"x", "python") for _ in iter(int, 1))):
        pass
""")
    (tmp_path / "workers").mkdir()
    parent = subprocess.Popen([sys.executable, script, tmp_path / "workers"], cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: len(list((tmp_path / "workers").iterdir())) >= 2)
    finally:
        parent.kill()
        parent.wait()
    workers = [int(path.name) for path in (tmp_path / "workers").iterdir()]
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
