"""Addresses that fail: which are tried again, after which pause, and what the errors name."""

import errno
import logging
import os
import socket
import threading
import time
from email.utils import formatdate
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests

from common.artifacts import load_meta
from dataloader import fetch as fetching
from dataloader import http
from dataloader.fetch import Unreachable
from tests.dataloader.helpers import Reply, closed_port, logged, mentions
from tests.dataloader.remote import HTML, WHOLE, get, shorten_waits, unreachable

pytestmark = pytest.mark.slow

REFUSED = os.strerror(errno.ECONNREFUSED)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "reviews_Baby_5.json.gz"


@pytest.mark.parametrize("fault", [Reply(status=404), Reply(status=403), Reply(status=503), Reply(status=429),
                                   Reply(HTML), Reply(hang_up=True), Reply(WHOLE, status=204)])
def test_the_next_address_is_tried_after_a_failed_one(server, target, fault):
    get(target, server.serve("/broken.gz", fault), server.serve("/file.gz", Reply(WHOLE)))
    paths = [asked.path for asked in server.asked]
    passing = fault.status in (429, 503) or fault.hang_up
    assert paths == ["/broken.gz"] * (4 if passing else 1) + ["/file.gz"]
    assert target.read_bytes() == WHOLE
    assert load_meta(target, "")["address"].endswith("/file.gz")


@pytest.mark.parametrize(("fault", "values"), [
    (Reply(status=404), [404, "Not Found"]), (Reply(status=403), [403, "Forbidden"]),
    (Reply(status=503), [503, "Service Unavailable", 4]), (Reply(hang_up=True), [4])])  # 4 attempts
def test_each_failed_address_has_one_line(server, target, fault, values):
    addresses = server.serve("/first.gz", fault), server.serve("/second.gz", Reply(HTML))
    with pytest.raises(Unreachable) as raised:
        get(target, *addresses)
    for line, address, told in zip(raised.value.tried, addresses, (values, [repr(HTML[:64])]), strict=True):
        assert line.startswith(f"{address}: ")
        assert mentions(line.removeprefix(f"{address}: "), *told), line


@pytest.mark.parametrize("fault", [Reply(status=500), Reply(status=503), Reply(status=429), Reply(hang_up=True)])
def test_a_temporary_fault_is_waited_for(server, target, fault):
    get(target, server.serve("/file.gz", fault, fault, Reply(WHOLE)))
    assert len(server.asked) == 3
    assert target.read_bytes() == WHOLE


class PatientEvent(threading.Event):
    """An event that records the seconds of each wait, and does not wait."""

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
def test_the_pause_follows_the_retry_after_header(server, target, form):
    stop = PatientEvent()
    value = {"seconds": "30", "date": formatdate(time.time() + 30, usegmt=True)}[form]
    busy = Reply(status=429, headers={"Retry-After": value})
    get(target, server.serve("/file.gz", busy, Reply(WHOLE)), stop=stop)
    [wait] = stop.waits
    assert 20 < wait <= 30.5
    assert target.read_bytes() == WHOLE


def test_a_server_that_asks_for_a_long_pause_is_left(server, target):
    busy = server.serve("/busy.gz", Reply(status=503, headers={"Retry-After": "3600"}))
    with unreachable(busy, 503, "Service Unavailable", 3600):
        get(target, busy)
    assert len(server.asked) == 1


@pytest.mark.parametrize("value", ["soon", "", "-5", "Tue, 99 May 2014"])
def test_an_invalid_retry_after_header_is_ignored(server, target, value):
    get(target, server.serve("/file.gz", Reply(status=503, headers={"Retry-After": value}), Reply(WHOLE)))
    assert target.read_bytes() == WHOLE


def test_a_silent_server_is_asked_again_for_the_rest(server, target):
    silence = threading.Event()
    address = server.serve("/file.gz", Reply(WHOLE, cut=200_000, wait=silence), Reply(WHOLE))
    started = time.monotonic()
    get(target, address)
    silence.set()
    assert time.monotonic() - started < 3
    assert int(server.asked[1].headers["Range"].removeprefix("bytes=").removesuffix("-")) > 100_000
    assert target.read_bytes() == WHOLE


def test_silence_is_named_with_its_seconds_and_bytes(server, target):
    silence = threading.Event()
    address = server.serve("/file.gz", Reply(WHOLE, cut=1, wait=silence))
    with unreachable(address, 0.3, 0, len(WHOLE), 4):  # seconds, bytes, 4 attempts
        get(target, address)
    silence.set()


def test_a_server_that_never_answers_is_left(server, target):
    silence = threading.Event()
    address = server.serve("/file.gz", Reply(WHOLE, before=lambda: silence.wait(10)))
    with unreachable(address, 0.3, 4):
        get(target, address)
    silence.set()


def test_a_closed_port_and_its_reason_are_named(target):
    address = f"{closed_port()}/file.gz"
    with unreachable(address, REFUSED, 4):
        get(target, address)


def test_a_fault_of_the_proxy_has_its_own_line(target, monkeypatch):
    lines = []
    for address in (f"{closed_port()}/file.gz", "http://localhost.example/file.gz"):
        with pytest.raises(Unreachable) as raised:
            get(target, address)
        [line] = raised.value.tried
        assert mentions(line, REFUSED)
        lines.append(line.removeprefix(address))
        monkeypatch.setenv("http_proxy", closed_port())
    assert lines[0] != lines[1]


@pytest.mark.skipif(find_spec("socks") is not None, reason="PySocks is installed")
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "socks5h://user:secret@127.0.0.1:1", "socks4://127.0.0.1:1"])
def test_a_proxy_that_needs_a_package_names_it(target, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    address = "http://localhost.example/file.gz"
    with pytest.raises(Unreachable) as raised:
        get(target, address)
    [line] = raised.value.tried
    assert mentions(line, "SOCKS")
    assert mentions(line, "PySocks")
    assert "secret" not in line
    with requests.Session() as session:  # an image is not missing because of the proxy
        assert http.ask(session, address).status == "unreachable"


def no_such_host(monkeypatch, *names: str) -> list[str]:
    """Let these host names be unknown; return the list of all that are looked up."""
    asked, look_up = [], socket.getaddrinfo

    def answer(host, *args, **kwargs):
        asked.append(host)
        if host in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


def test_an_unknown_host_is_not_waited_for(target, monkeypatch):
    asked = no_such_host(monkeypatch, "nowhere.invalid")
    with unreachable("http://nowhere.invalid/file.gz", "Name or service not known"):
        get(target, "http://nowhere.invalid/file.gz")
    assert asked == ["nowhere.invalid"]


def test_a_host_that_was_known_before_is_waited_for(server, target, monkeypatch):
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
def test_an_invalid_address_has_one_line(target, address):
    with unreachable(address):
        get(target, address)


def test_the_log_names_files_addresses_faults_and_pauses(server, target, caplog):
    caplog.set_level(logging.INFO)
    address = server.serve("/file.gz", Reply(status=503), Reply(WHOLE))
    get(target, address)
    assert logged(caplog, address, 503, "0.0")  # seconds
    assert logged(caplog, address, target.name, 0.3)  # MB
