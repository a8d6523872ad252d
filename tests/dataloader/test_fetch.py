"""Which answers are accepted as the requested file, and which files exist after a refusal."""

import gzip
import io
import os
import random
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.artifacts import load_meta
from common.errors import ResourceError
from dataloader import fetch as fetching
from dataloader.fetch import is_fetched
from tests.dataloader.helpers import Reply
from tests.dataloader.remote import (
    HTML,
    OTHER,
    ROOT,
    WHOLE,
    beside,
    get,
    names,
    put_part,
    sha256,
    shorten_waits,
    unreachable,
    wait_until,
)
from tests.errors import refused

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "reviews_Baby_5.json.gz"


def test_a_wrong_checksum_names_both_and_keeps_a_bad_file(server, target):
    address = server.serve("/file.gz", Reply(OTHER))
    with unreachable(address, sha256(WHOLE), sha256(OTHER), f"{target.name}.bad"):
        get(target, address, sha256=sha256(WHOLE))
    assert beside(target, ".bad").read_bytes() == OTHER
    assert names(target.parent) == {target.name + ".bad"}


def test_a_wrong_checksum_leaves_the_old_file(server, target):
    address = server.serve("/file.gz", Reply(WHOLE), Reply(OTHER))
    get(target, address)
    with unreachable(address, sha256(WHOLE), sha256(OTHER)):
        get(target, address, force=True, sha256=sha256(WHOLE))
    assert target.read_bytes() == WHOLE
    assert is_fetched(target)


def test_a_continued_file_with_a_wrong_checksum_starts_again(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    put_part(target, address, OTHER[:9000])
    get(target, address, sha256=sha256(WHOLE))
    assert target.read_bytes() == WHOLE


def test_a_failed_update_leaves_the_old_file_and_manifest(server, target):
    address = server.serve("/file.gz", Reply(WHOLE), Reply(HTML))
    get(target, address)
    with unreachable(address, repr(HTML[:64])):
        get(target, address, force=True)
    assert target.read_bytes() == WHOLE
    assert load_meta(target, "")["sha256"] == sha256(WHOLE)


def test_an_update_keeps_the_old_file_until_it_is_complete(server, target):
    rest = threading.Event()
    address = server.serve("/file.gz", Reply(WHOLE), Reply(OTHER, cut=200_000, wait=rest))
    get(target, address)
    update = threading.Thread(target=get, args=(target, address), kwargs={"force": True})
    update.start()
    wait_until(lambda: beside(target, ".part").exists() and beside(target, ".part").stat().st_size)
    assert target.read_bytes() == WHOLE
    assert is_fetched(target)
    rest.set()
    update.join(timeout=10)
    assert target.read_bytes() == OTHER


@pytest.mark.parametrize(("name", "body", "format_"), [
    ("a.json.gz", HTML, "gzip"), ("a.zip", HTML, "zip"), ("a.jsonl", HTML, "JSON"), ("a.inter", b"\n" + HTML, ""),
    ("a.json.gz", b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code>', "gzip"), ("a.gz", b"not found", "gzip"),
    ("a.json", b"Not found", "JSON")])
def test_an_error_page_is_refused_with_its_first_bytes(server, tmp_path, name, body, format_):
    address = server.serve("/file", Reply(body))
    with unreachable(address, format_, repr(body[:64])):
        get(tmp_path / name, address)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("name", "body"), [
    ("a.jsonl", b'\xef\xbb\xbf {"a": 1}\n'), ("a.json", b"[]"), ("a.inter", b"user_id:token\n"), ("a.gz", WHOLE)])
def test_a_file_that_arrives_byte_by_byte_is_accepted(server, tmp_path, monkeypatch, name, body):
    monkeypatch.setattr(fetching, "CHUNK", 1)
    body = body[:200] if name != "a.gz" else gzip.compress(b"short", mtime=0)
    get(tmp_path / name, server.serve("/file", Reply(body)))
    assert (tmp_path / name).read_bytes() == body


@pytest.mark.parametrize("name", ["a.gz", "a.zip", "a.inter"])
def test_an_empty_answer_is_refused(server, tmp_path, name):
    address = server.serve("/file", Reply(b""))
    with unreachable(address):
        get(tmp_path / name, address)
    assert names(tmp_path) == set()


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_file_is_read_to_its_end(server, tmp_path):
    good = zip_of(ratings=random.Random(3).randbytes(50_000), b=b"b")
    at = good.index(b"PK\x03\x04", 10) - 1000  # a byte of the first member's content
    bad = good[:at] + bytes([good[at] ^ 1]) + good[at + 1:]
    for path, body, member in (("/bad", bad, "ratings"), ("/short", good[:30_000], "")):
        address = server.serve(path, Reply(body))
        with unreachable(address, member):
            get(tmp_path / "a.zip", address)
        assert names(tmp_path) == set()
    get(tmp_path / "a.zip", server.serve("/good", Reply(good)))
    assert (tmp_path / "a.zip").read_bytes() == good


def test_a_malicious_archive_is_refused_with_the_member_name(server, tmp_path):
    address = server.serve("/malicious", Reply(zip_of(**{"a": b"a", "../x": b"x"})))
    with unreachable(address, "../x"):
        get(tmp_path / "a.zip", address)
    assert names(tmp_path) == set()


def test_a_gzip_bomb_is_checked_in_little_memory(server, tmp_path):
    # 600 MB of zeros, for a child that may allocate at most 400 MB.
    body = gzip.compress(bytes(1 << 20), mtime=0) * 600  # concatenated members, as `cat` writes them
    code = ("import resource, sys; from pathlib import Path; from dataloader.fetch import RemoteFile, fetch_all\n"
            "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)\n"
            "fetch_all([RemoteFile(Path(sys.argv[1]), [sys.argv[2]])])")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.gz"), server.serve("/bomb", Reply(body))],
                          cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.gz").read_bytes() == body


def test_a_file_without_a_manifest_is_fetched_again(server, target):
    target.parent.mkdir()
    target.write_bytes(WHOLE[:100])
    get(target, server.serve("/file.gz", Reply(WHOLE)))
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"size": 100}'])
def test_a_file_whose_manifest_is_damaged_is_fetched_again(server, target, manifest):
    target.parent.mkdir()
    target.write_bytes(WHOLE[:100])
    beside(target, ".meta.json").write_text(manifest)
    get(target, server.serve("/file.gz", Reply(WHOLE)))
    assert target.read_bytes() == WHOLE
    assert is_fetched(target)


def test_a_file_of_wrong_size_is_fetched_again(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    get(target, address)
    target.write_bytes(WHOLE[:100])
    get(target, address)
    assert target.read_bytes() == WHOLE


def test_a_file_with_its_manifest_is_not_requested_again(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    get(target, address)
    get(target, address)
    assert len(server.asked) == 1


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_between_file_and_manifest_loses_nothing(server, target, monkeypatch, links):
    """The content is renamed first, then the manifest."""
    address = server.serve("/file.gz", Reply(WHOLE))
    replace = os.replace

    def die(source, destination):
        if Path(destination).name.endswith(".meta.json"):
            raise KeyboardInterrupt
        replace(source, destination)

    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "replace", die)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(KeyboardInterrupt):
        get(target, address)
    monkeypatch.setattr(os, "replace", replace)
    get(target, address)
    assert len(server.asked) == 1
    assert load_meta(target, "")["sha256"] == sha256(WHOLE)


def test_a_full_disk_is_found_before_the_download(server, target, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with refused(ResourceError, beside(target, ".part"), names=[len(WHOLE), 1000], fix=["--data_root"]):
        get(target, server.serve("/file.gz", Reply(WHOLE)))
    assert names(target.parent) == set()
