"""What is accepted as the file that was asked for, and what is there when it was not."""

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
from dataloader.fetch import Unreachable, is_fetched
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
    wait_until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "reviews_Baby_5.json.gz"


def test_a_wrong_checksum_keeps_the_file_as_bad_and_names_both_hashes(server, target):
    with pytest.raises(Unreachable) as error:
        get(target, server.serve("/file.gz", Reply(OTHER)), sha256=sha256(WHOLE))
    assert sha256(WHOLE) in str(error.value)
    assert sha256(OTHER) in str(error.value)
    assert beside(target, ".bad").read_bytes() == OTHER
    assert names(target.parent) == {target.name + ".bad"}


def test_a_wrong_checksum_leaves_the_old_file(server, target):
    address = server.serve("/file.gz", Reply(WHOLE), Reply(OTHER))
    get(target, address)
    with pytest.raises(Unreachable):
        get(target, address, force=True, sha256=sha256(WHOLE))
    assert target.read_bytes() == WHOLE
    assert is_fetched(target)


def test_a_checksum_that_fails_on_a_continued_part_is_tried_once_more_from_the_start(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    put_part(target, address, OTHER[:9000])
    get(target, address, sha256=sha256(WHOLE))
    assert target.read_bytes() == WHOLE


def test_a_failed_renewal_leaves_the_old_file_and_its_manifest(server, target):
    address = server.serve("/file.gz", Reply(WHOLE), Reply(HTML))
    get(target, address)
    with pytest.raises(Unreachable):
        get(target, address, force=True)
    assert target.read_bytes() == WHOLE
    assert load_meta(target, "")["sha256"] == sha256(WHOLE)


def test_a_renewal_keeps_the_old_file_until_the_new_one_is_whole(server, target):
    rest = threading.Event()
    address = server.serve("/file.gz", Reply(WHOLE), Reply(OTHER, cut=200_000, wait=rest))
    get(target, address)
    renewal = threading.Thread(target=get, args=(target, address), kwargs={"force": True})
    renewal.start()
    wait_until(lambda: beside(target, ".part").exists() and beside(target, ".part").stat().st_size)
    assert target.read_bytes() == WHOLE
    assert is_fetched(target)
    rest.set()
    renewal.join(timeout=10)
    assert target.read_bytes() == OTHER


@pytest.mark.parametrize(("name", "body", "kind"), [
    ("a.json.gz", HTML, "gzip"), ("a.zip", HTML, "zip"), ("a.jsonl", HTML, "JSON"), ("a.inter", b"\n" + HTML, "a data"),
    ("a.json.gz", b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code>', "gzip"), ("a.gz", b"not found", "gzip"),
    ("a.json", b"Not found", "JSON")])
def test_an_error_page_in_place_of_an_archive_is_refused_with_its_first_bytes(server, tmp_path, name, body, kind):
    address = server.serve("/file", Reply(body))
    with pytest.raises(Unreachable) as error:
        get(tmp_path / name, address)
    assert f"{address}: not {kind}" in str(error.value)
    assert f"first bytes {body[:60]!r}"[:60] in str(error.value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("name", "body"), [
    ("a.jsonl", b'\xef\xbb\xbf {"a": 1}\n'), ("a.json", b"[]"), ("a.inter", b"user_id:token\n"), ("a.gz", WHOLE)])
def test_a_file_that_comes_byte_by_byte_is_no_error_page(server, tmp_path, monkeypatch, name, body):
    monkeypatch.setattr(fetching, "CHUNK", 1)
    body = body[:200] if name != "a.gz" else gzip.compress(b"short", mtime=0)
    get(tmp_path / name, server.serve("/file", Reply(body)))
    assert (tmp_path / name).read_bytes() == body


@pytest.mark.parametrize("name", ["a.gz", "a.zip", "a.inter"])
def test_an_empty_answer_is_no_file(server, tmp_path, name):
    with pytest.raises(Unreachable, match="an empty file"):
        get(tmp_path / name, server.serve("/file", Reply(b"")))
    assert names(tmp_path) == set()


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_file_is_read_to_its_end(server, tmp_path):
    good = zip_of(a=random.Random(3).randbytes(50_000), b=b"b")
    at = good.index(b"PK\x03\x04", 10) - 1000  # a byte of the first member's content
    bad = good[:at] + bytes([good[at] ^ 1]) + good[at + 1:]
    with pytest.raises(Unreachable, match=r"a is damaged \(Bad CRC-32"):
        get(tmp_path / "a.zip", server.serve("/bad", Reply(bad)))
    with pytest.raises(Unreachable, match="not a whole zip archive"):
        get(tmp_path / "a.zip", server.serve("/short", Reply(good[:30_000])))
    get(tmp_path / "a.zip", server.serve("/good", Reply(good)))
    assert (tmp_path / "a.zip").read_bytes() == good


def test_a_hostile_archive_is_refused_by_the_name_of_its_member(server, tmp_path):
    with pytest.raises(Unreachable, match=r"\.\./x points outside"):
        get(tmp_path / "a.zip", server.serve("/hostile", Reply(zip_of(**{"a": b"a", "../x": b"x"}))))
    assert names(tmp_path) == set()


def test_a_gzip_bomb_is_checked_in_little_memory(server, tmp_path):
    # 600 MB of zeros, for a child that may take no more than 400 MB beyond what it starts with.
    body = gzip.compress(bytes(1 << 20), mtime=0) * 600  # members one after another, as `cat` makes them
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


def test_a_file_of_another_size_than_its_manifest_says_is_fetched_again(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    get(target, address)
    target.write_bytes(WHOLE[:100])
    get(target, address)
    assert target.read_bytes() == WHOLE


def test_a_file_with_its_manifest_is_not_asked_for_again(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    get(target, address)
    get(target, address)
    assert len(server.asked) == 1


@pytest.mark.parametrize("links", [True, False])
def test_a_process_killed_between_file_and_manifest_has_lost_nothing(server, target, monkeypatch, links):
    """After the rename of the content comes the rename of the manifest."""
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


def test_a_disk_that_is_too_small_is_found_before_the_bytes_come(server, target, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError) as error:
        get(target, server.serve("/file.gz", Reply(WHOLE)))
    assert error.value.exit_code == 5
    assert error.value.why == f"{len(WHOLE)} bytes are needed, 1000 are free"
    assert names(target.parent) == set()
