"""Interrupted downloads are continued, but never from another version; a server on loopback plays the faults."""

import gzip
import random
import threading
from email.utils import formatdate
from pathlib import Path

import pytest

from common.artifacts import load_meta
from dataloader import fetch as fetching
from dataloader.fetch import Unreachable
from tests.dataloader.helpers import Reply, mentions
from tests.dataloader.remote import (
    HTML,
    OTHER,
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

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "reviews_Baby_5.json.gz"


def test_a_file_gets_its_name_after_the_last_byte(server, target):
    body, rest = gzip.compress(random.Random(2).randbytes(2_500_000), mtime=0), threading.Event()
    address = server.serve("/file.gz", Reply(body, cut=2_400_000, wait=rest))
    transfer = threading.Thread(target=get, args=(target, address))
    transfer.start()
    part = beside(target, ".part")
    wait_until(lambda: part.exists() and part.stat().st_size)
    assert 0 < part.stat().st_size < len(body)
    assert names(target.parent) == {part.name, part.name + ".tag"}
    rest.set()
    transfer.join(timeout=10)
    assert names(target.parent) == {target.name, target.name + ".meta.json"}
    assert target.read_bytes() == body
    manifest = load_meta(target, "")
    assert (manifest["address"], manifest["sha256"], manifest["size"]) == (address, sha256(body), len(body))


def test_a_cut_connection_is_continued_with_a_range_request(server, target):
    get(target, server.serve("/file.gz", Reply(WHOLE, cut=200_000), Reply(WHOLE)))
    assert target.read_bytes() == WHOLE
    [first, second] = server.asked
    assert "Range" not in first.headers
    start = int(second.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 100_000 < start <= 200_000
    assert second.headers["If-Range"] == '"first"'


def test_the_next_run_continues_after_too_many_cuts(server, target):
    address = server.serve("/file.gz", Reply(WHOLE, cut=70_000))
    part = beside(target, ".part")
    with pytest.raises(Unreachable) as raised:
        get(target, address)
    got = part.stat().st_size
    [line] = raised.value.tried
    assert line.startswith(f"{address}: ")
    assert mentions(line.removeprefix(f"{address}: "), got, len(WHOLE), 4)  # 4 attempts
    assert part.read_bytes() == WHOLE[:got]
    assert not target.exists()
    server.serve("/file.gz", Reply(WHOLE))
    get(target, address)
    assert server.asked[-1].headers["Range"] == f"bytes={got}-"
    assert target.read_bytes() == WHOLE


def test_attempts_with_many_bytes_do_not_count(server, target, monkeypatch):
    monkeypatch.setattr(fetching, "WORTHWHILE", 30_000)
    get(target, server.serve("/file.gz", Reply(WHOLE, cut=40_000)))
    assert len(server.asked) == 8  # for 300,000 bytes; more than 4 attempts
    assert target.read_bytes() == WHOLE


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, target):
    get(target, server.serve("/file.gz", Reply(WHOLE, cut=200_000), Reply(WHOLE, ranges="ignored")))
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("ranges", ["honoured", "blind"])
def test_a_changed_file_is_not_appended_to_the_old_part(server, target, ranges):
    changed = Reply(OTHER, etag='"second"', ranges=ranges)
    get(target, server.serve("/file.gz", Reply(WHOLE, cut=200_000), changed))
    assert target.read_bytes() == OTHER


@pytest.mark.parametrize(("etag", "continued"), [('W/"first"', False), ("", False), ('"first"', True)])
def test_only_a_file_with_a_strong_etag_is_continued(server, target, etag, continued):
    get(target, server.serve("/file.gz", Reply(WHOLE, etag=etag, cut=200_000), Reply(WHOLE, etag=etag)))
    assert ("Range" in server.asked[1].headers) == continued
    assert target.read_bytes() == WHOLE


def test_the_date_tells_the_version_without_a_strong_etag(server, target):
    dated = Reply(WHOLE, etag="", headers={"Last-Modified": formatdate(1_400_000_000, usegmt=True)})
    get(target, server.serve("/file.gz", dated._replace(cut=200_000), dated))
    assert server.asked[1].headers["If-Range"] == "Tue, 13 May 2014 16:53:20 GMT"
    assert "Range" in server.asked[1].headers
    assert target.read_bytes() == WHOLE


def test_a_part_of_one_address_is_not_continued_at_another(server, target):
    cut = server.serve("/cut.gz", Reply(WHOLE, cut=70_000))
    get(target, cut, server.serve("/other.gz", Reply(OTHER, ranges="blind")))
    assert target.read_bytes() == OTHER


@pytest.mark.parametrize("useless", [Reply(HTML), Reply(status=404), Reply(status=503)])
def test_an_address_without_the_file_keeps_the_part(server, target, useless):
    cut, other = server.serve("/cut.gz", Reply(WHOLE, cut=70_000)), server.serve("/other.gz", useless)
    with pytest.raises(Unreachable):
        get(target, cut, other)
    got = beside(target, ".part").stat().st_size
    server.serve("/cut.gz", Reply(WHOLE))
    get(target, cut, other)
    assert server.asked[-1].headers["Range"] == f"bytes={got}-"
    assert target.read_bytes() == WHOLE


def test_a_complete_part_of_a_killed_process_is_used(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    put_part(target, address, WHOLE)
    get(target, address)
    assert [asked.headers.get("Range") for asked in server.asked] == [f"bytes={len(WHOLE)}-"]
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("content", [WHOLE + b"more", WHOLE[:1000] + bytes(5000), OTHER[:9000]])
def test_a_damaged_part_is_fetched_from_the_start(server, target, content):
    address = server.serve("/file.gz", Reply(WHOLE))
    put_part(target, address, content)
    get(target, address)
    assert "Range" in server.asked[0].headers
    assert "Range" not in server.asked[1].headers
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("tag", ["", '{"address": ', "[]", "{}", '"text"'])
def test_a_part_with_a_damaged_tag_is_not_continued(server, target, tag):
    address = server.serve("/file.gz", Reply(WHOLE))
    put_part(target, address, OTHER[:9000], tag)
    get(target, address)
    assert "Range" not in server.asked[0].headers
    assert target.read_bytes() == WHOLE


def test_a_cut_in_a_transfer_without_length_is_noticed(server, target):
    address = server.serve("/file.gz", Reply(WHOLE, length="chunked", cut=200_000), Reply(WHOLE, length="chunked"))
    get(target, address)
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("length", ["untold", "short"])
def test_a_gz_file_that_ends_early_is_refused(server, target, length):
    address = server.serve("/file.gz", Reply(WHOLE, length=length, cut=200_000))
    with unreachable(address):
        get(target, address)
    assert names(target.parent) == set()


def test_a_length_beyond_the_end_of_the_file_is_accepted(server, target):
    get(target, server.serve("/file.gz", Reply(WHOLE, length="long")))
    assert server.asked[-1].headers["Range"] == f"bytes={len(WHOLE)}-"
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("length", ["told", "untold", "chunked"])
@pytest.mark.parametrize("size", [len(WHOLE) - 1, len(WHOLE) + 1])
def test_a_file_of_another_size_is_refused(server, target, length, size):
    address = server.serve("/file.gz", Reply(WHOLE, length=length))
    with unreachable(address, size):
        get(target, address, size=size)
    assert not target.exists()


def test_a_known_size_shows_a_cut_without_length(server, target):
    address = server.serve("/file.gz", Reply(WHOLE, length="untold", cut=200_000), Reply(WHOLE, length="untold"))
    get(target, address, size=len(WHOLE))
    assert "Range" in server.asked[1].headers
    assert target.read_bytes() == WHOLE


def test_a_gz_file_sent_as_an_encoding_stays_compressed(server, target):
    get(target, server.serve("/file.gz", Reply(WHOLE, headers={"Content-Encoding": "gzip"})))
    assert target.read_bytes() == WHOLE
    assert server.asked[0].headers["Accept-Encoding"] == "identity"


def test_a_redirect_is_followed_again_after_a_cut(server, target):
    there = Reply(status=302, headers={"Location": f"{server.url}/elsewhere.gz"}, etag="")
    server.serve("/elsewhere.gz", Reply(WHOLE, cut=200_000), Reply(WHOLE))
    address = server.serve("/file.gz", there)
    get(target, address)
    assert [asked.path for asked in server.asked] == ["/file.gz", "/elsewhere.gz"] * 2
    assert "Range" in server.asked[3].headers
    assert target.read_bytes() == WHOLE
    assert load_meta(target, "")["address"] == address


def test_endless_redirects_are_refused(server, target):
    address = server.serve("/file.gz", Reply(status=302, headers={"Location": "/file.gz"}))
    with unreachable(address, 30):
        get(target, address)
    assert len(server.asked) == 31
