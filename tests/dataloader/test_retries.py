"""Addresses that fail: which are asked again, after what pause, and what is said of them."""

import logging
import socket
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from common.artifacts import load_meta
from dataloader import fetch as fetching
from dataloader.fetch import Unreachable
from tests.dataloader.helpers import Reply, closed_port
from tests.dataloader.remote import HTML, WHOLE, get, shorten_waits

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "reviews_Baby_5.json.gz"


@pytest.mark.parametrize("fault", [Reply(status=404), Reply(status=403), Reply(status=503), Reply(status=429),
                                   Reply(HTML), Reply(hang_up=True), Reply(WHOLE, status=204)])
def test_an_address_that_fails_falls_to_the_next(server, target, fault):
    get(target, server.serve("/broken.gz", fault), server.serve("/file.gz", Reply(WHOLE)))
    paths = [asked.path for asked in server.asked]
    passing = fault.status in (429, 503) or fault.hang_up
    assert paths == ["/broken.gz"] * (4 if passing else 1) + ["/file.gz"]
    assert target.read_bytes() == WHOLE
    assert load_meta(target, "")["address"].endswith("/file.gz")


@pytest.mark.parametrize(("fault", "words"), [
    (Reply(status=404), "answered 404 Not Found"), (Reply(status=403), "answered 403 Forbidden"),
    (Reply(status=503), "answered 503 Service Unavailable (4 attempts)"),
    (Reply(hang_up=True), "cannot connect: Remote end closed connection without response (4 attempts)")])
def test_each_address_that_failed_has_one_line(server, target, fault, words):
    first, second = server.serve("/first.gz", fault), server.serve("/second.gz", Reply(HTML))
    with pytest.raises(Unreachable) as error:
        get(target, first, second)
    assert error.value.tried == [f"{first}: {words}", f"{second}: not gzip; first bytes {HTML[:64]!r}"]


@pytest.mark.parametrize("fault", [Reply(status=500), Reply(status=503), Reply(status=429), Reply(hang_up=True)])
def test_a_fault_that_passes_is_waited_for(server, target, fault):
    get(target, server.serve("/file.gz", fault, fault, Reply(WHOLE)))
    assert len(server.asked) == 3
    assert target.read_bytes() == WHOLE


class PatientEvent(threading.Event):
    """An event for which nobody waits long, and which remembers how long it would have been."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return super().wait(0)


def test_pauses_grow(server, target, monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE", fetching.PATIENCE._replace(first=2.0))
    stop = PatientEvent()
    with pytest.raises(Unreachable):
        get(target, server.serve("/file.gz", Reply(status=503)), stop=stop)
    assert stop.waits == [2.0, 4.0, 8.0]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_names_a_time_is_left_alone_for_so_long(server, target, form):
    stop = PatientEvent()
    told = {"seconds": "30", "date": formatdate(time.time() + 30, usegmt=True)}[form]
    busy = Reply(status=429, headers={"Retry-After": told})
    get(target, server.serve("/file.gz", busy, Reply(WHOLE)), stop=stop)
    [wait] = stop.waits
    assert 20 < wait <= 30.5
    assert target.read_bytes() == WHOLE


def test_a_server_that_asks_for_too_long_a_time_is_left_for_the_next(server, target):
    busy = server.serve("/busy.gz", Reply(status=503, headers={"Retry-After": "3600"}))
    with pytest.raises(Unreachable) as error:
        get(target, busy)
    assert error.value.tried == [f"{busy}: answered 503 Service Unavailable, and asks to wait for 3600 s"]
    assert len(server.asked) == 1


@pytest.mark.parametrize("told", ["soon", "", "-5", "Tue, 99 May 2014"])
def test_a_time_that_is_none_is_no_obstacle(server, target, told):
    get(target, server.serve("/file.gz", Reply(status=503, headers={"Retry-After": told}), Reply(WHOLE)))
    assert target.read_bytes() == WHOLE


def test_a_server_that_falls_silent_is_cut_off_and_continued(server, target):
    silence = threading.Event()
    address = server.serve("/file.gz", Reply(WHOLE, cut=200_000, wait=silence), Reply(WHOLE))
    started = time.monotonic()
    get(target, address)
    silence.set()
    assert time.monotonic() - started < 3
    assert int(server.asked[1].headers["Range"].removeprefix("bytes=").removesuffix("-")) > 100_000
    assert target.read_bytes() == WHOLE


def test_silence_is_named_with_the_bytes_that_came(server, target):
    silence = threading.Event()
    with pytest.raises(Unreachable) as error:
        get(target, server.serve("/file.gz", Reply(WHOLE, cut=1, wait=silence)))
    silence.set()
    assert f"silent for 0.3 s, cut off after 0 of {len(WHOLE)} bytes (4 attempts)" in str(error.value)


def test_a_server_that_never_answers_is_left_after_a_while(server, target):
    silence = threading.Event()
    address = server.serve("/file.gz", Reply(WHOLE, before=lambda: silence.wait(10)))
    with pytest.raises(Unreachable) as error:
        get(target, address)
    silence.set()
    assert error.value.tried == [f"{address}: no answer within 0.3 s (4 attempts)"]


def test_a_closed_port_says_why(target):
    address = f"{closed_port()}/file.gz"
    with pytest.raises(Unreachable) as error:
        get(target, address)
    assert error.value.tried == [f"{address}: cannot connect: Connection refused (4 attempts)"]


def test_a_proxy_that_is_not_there_is_named(target, monkeypatch):
    monkeypatch.setenv("http_proxy", closed_port())
    with pytest.raises(Unreachable, match="cannot connect to the proxy: Connection refused"):
        get(target, "http://localhost.example/file.gz")


def no_such_host(monkeypatch, *names: str) -> list[str]:
    """Let these names be unknown; returns what is asked for."""
    asked, look_up = [], socket.getaddrinfo

    def answer(host, *args, **kwargs):
        asked.append(host)
        if host in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


def test_a_name_that_nobody_knows_is_not_waited_for(target, monkeypatch):
    asked = no_such_host(monkeypatch, "nowhere.invalid")
    with pytest.raises(Unreachable) as error:
        get(target, "http://nowhere.invalid/file.gz")
    assert error.value.tried == ["http://nowhere.invalid/file.gz: cannot connect: Name or service not known"]
    assert asked == ["nowhere.invalid"]


def test_a_name_that_was_known_a_moment_ago_is_waited_for(server, target, monkeypatch):
    address = server.serve("/file.gz", Reply(WHOLE, cut=200_000), Reply(WHOLE)).replace("127.0.0.1", "localhost")
    look_up, lost = socket.getaddrinfo, []

    def answer(host, *args, **kwargs):
        if len(server.asked) == 1 and not lost:
            lost.append(host)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    get(target, address)
    assert lost == ["localhost"]
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("address", ["example.org/file.gz", "http://", "file:///etc/passwd", "http://a b/", "http://[/"])
def test_what_is_no_address_is_a_line_like_the_others(target, address):
    with pytest.raises(Unreachable) as error:
        get(target, address)
    assert len(error.value.tried) == 1


def test_each_file_is_named_with_its_address_and_each_fault_with_the_pause(server, target, caplog):
    caplog.set_level(logging.INFO)
    address = server.serve("/file.gz", Reply(status=503), Reply(WHOLE))
    get(target, address)
    assert f"download: {address}: answered 503 Service Unavailable; again in 0.0 s" in caplog.text
    assert f"download: {target.name}, 0.3 MB, from {address}" in caplog.text
