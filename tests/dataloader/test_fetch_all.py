"""Several files at once: concurrency, the shared line of progress, and a stop."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import progress
from dataloader import fetch as fetching
from dataloader.fetch import RemoteFile, Unreachable, fetch_all, is_fetched
from tests.dataloader.helpers import Reply, mentions
from tests.dataloader.remote import ROOT, WHOLE, put_part, shorten_waits, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


def remote(server, folder: Path, *file_names: str) -> list[RemoteFile]:
    return [RemoteFile(folder / name, [f"{server.url}/{name}"]) for name in file_names]


def test_several_files_are_fetched_at_once(server, tmp_path):
    all_there = threading.Barrier(4)  # breaks, and the requests fail, unless all four are open at once
    file_names = [f"{n}.gz" for n in range(4)]
    for name in file_names:
        server.serve(f"/{name}", Reply(WHOLE, before=lambda: all_there.wait(timeout=5)))
    fetch_all(remote(server, tmp_path, *file_names))
    assert not all_there.broken
    assert all((tmp_path / name).read_bytes() == WHOLE for name in file_names)


def test_the_number_of_files_at_once_is_limited(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "AT_ONCE", 2)
    lock, under_way, most = threading.Lock(), 0, 0

    def count():
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1

    file_names = [f"{n}.gz" for n in range(6)]
    for name in file_names:
        server.serve(f"/{name}", Reply(WHOLE, before=count))
    fetch_all(remote(server, tmp_path, *file_names))
    assert most == 2
    assert all(is_fetched(tmp_path / name) for name in file_names)


def test_a_missing_file_does_not_stop_the_others(server, tmp_path):
    files = remote(server, tmp_path, "a.gz", "b.gz", "c.gz")
    server.serve("/b.gz", Reply(WHOLE))
    with pytest.raises(Unreachable) as error:
        fetch_all(files)
    for line, name in zip(error.value.tried, ("a.gz", "c.gz"), strict=True):
        assert line.startswith(f"{server.url}/{name}: ")
        assert mentions(line, 404)
    assert is_fetched(tmp_path / "b.gz")


def test_a_local_fault_ends_all_transfers(server, tmp_path, monkeypatch):
    silence = threading.Event()
    server.serve("/a.gz", Reply(WHOLE, cut=100_000, wait=silence))
    server.serve("/b.gz", Reply(WHOLE))
    monkeypatch.setattr(fetching, "STALL_TIMEOUT", 30)
    (tmp_path / "b.gz.part").mkdir()  # a folder where a file is expected
    started = time.monotonic()
    with pytest.raises(IsADirectoryError):
        fetch_all(remote(server, tmp_path, "a.gz", "b.gz"))
    assert time.monotonic() - started < 5
    silence.set()


def test_the_files_share_one_line_of_progress(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    rest = threading.Event()
    server.serve("/a.gz", Reply(WHOLE, cut=len(WHOLE) // 2, wait=rest))
    server.serve("/b.gz", Reply(WHOLE, length="chunked", cut=len(WHOLE) // 2, wait=rest))
    threading.Timer(0.25, rest.set).start()
    fetch_all(remote(server, tmp_path, "a.gz", "b.gz"))
    lines = capsys.readouterr().err.splitlines()
    # Two chunks of a have arrived. The size of b is unknown, so the total share and the remaining time are those of a.
    assert any(line.count("44 %") == 2 and mentions(line, "a.gz 44 %", "b.gz 0.1 MB")
               and re.search(r"\b\d+:\d\d\b", line) for line in lines), lines
    assert all(mentions(line, "a.gz", "b.gz") for line in lines)


def test_bytes_of_an_earlier_run_do_not_count_as_speed(server, tmp_path, monkeypatch):
    address = server.serve("/a.gz", Reply(WHOLE))
    put_part(tmp_path / "raw" / "a.gz", address, WHOLE[:-1000])
    seen = []
    monkeypatch.setattr(fetching.Progress, "update", lambda self, count=1, **_: seen.append((self.initial, self.total)))
    fetch_all([RemoteFile(tmp_path / "raw" / "a.gz", [address])])
    assert seen[-1] == (len(WHOLE) - 1000, len(WHOLE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_immediate_and_keeps_the_parts(server, tmp_path, number):
    silence = threading.Event()
    for name in ("a.gz", "b.gz"):
        server.serve(f"/{name}", Reply(WHOLE, cut=200_000, wait=silence), Reply(WHOLE))
    code = ("import sys; from pathlib import Path; from common.command import run_command\n"
            "from dataloader.fetch import RemoteFile, fetch_all\n"
            "folder, url = sys.argv[1:]\n"
            "files = [RemoteFile(Path(folder, name), [f'{url}/{name}']) for name in ('a.gz', 'b.gz')]\n"
            "sys.exit(run_command(lambda argv: fetch_all(files)))")
    command = [sys.executable, "-c", code, str(tmp_path), server.url]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    parts = [tmp_path / f"{name}.gz.part" for name in "ab"]
    wait_until(lambda: all(part.exists() and part.stat().st_size > 100_000 for part in parts))
    child.send_signal(number)
    started = time.monotonic()
    _, err = child.communicate(timeout=20)
    assert time.monotonic() - started < 3
    silence.set()
    assert child.returncode == 128 + number
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Fix: " in line
    assert "Traceback" not in err
    sizes = [part.stat().st_size for part in parts]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    ranges = {asked.path: asked.headers["Range"] for asked in server.asked[2:]}
    assert ranges == {f"/{name}.gz": f"bytes={size}-" for name, size in zip("ab", sizes, strict=True)}
    assert all((tmp_path / f"{name}.gz").read_bytes() == WHOLE for name in "ab")
