"""Requests for many addresses of a server on loopback: rate, concurrency, retries and stops."""

import errno
import os
import random
import threading
import time
from email.utils import formatdate

import pytest
import requests

from dataloader import http
from dataloader.http import Fetcher
from tests.dataloader.helpers import Reply, closed_port, mentions
from tests.dataloader.image_server import ImageServer, png

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http.Fetcher, "retry_policy", http.Fetcher.retry_policy._replace(first=0.02))


@pytest.fixture
def server():
    server = ImageServer()
    yield server
    server.close()


def outcomes(addresses: list[str], rate: float = 1000) -> dict[str, tuple[str, str]]:
    return {address: (answer.status, answer.detail) for address, answer in Fetcher(addresses, rate).results()}


def gives(address: str, status: str, *values: object) -> bool:
    """Whether the answer has this status, and a detail that mentions the values (no detail if it was fetched)."""
    found, detail = outcomes([address])[address]
    return found == status and mentions(detail, *values) and (detail == "") == (status == "fetched")


def test_every_address_gives_its_own_bytes(server):
    addresses = server.serve_images(40)
    fetched = {address: answer.body for address, answer in Fetcher(addresses, 1000).results()}
    assert fetched == {address: png(number) for number, address in enumerate(addresses)}


def test_connections_per_host_are_limited_and_hosts_take_turns(server):
    other = ImageServer()
    server.seconds = other.seconds = 0.1
    addresses = server.serve_images(12) + other.serve_images(12)
    assert {status for status, _ in outcomes(addresses).values()} == {"fetched"}
    other.close()
    assert 1 < server.peak <= 4
    assert 1 < other.peak <= 4
    assert min(other.moments) < max(server.moments)
    assert min(server.moments) < max(other.moments)


def test_requests_keep_the_rate(server):
    addresses = server.serve_images(11)
    begun = time.monotonic()
    outcomes(addresses, rate=50)
    late = [moment - begun - number / 50 for number, moment in enumerate(sorted(server.moments))]
    assert min(late) >= 0  # measured from the start, so that a slow machine can only add


def test_retries_and_redirects_count_as_requests(server):
    server.serve("/moved", Reply(status=302, headers={"Location": "/shaky"}))
    server.serve("/shaky", Reply(status=500), Reply(png(0)))
    begun = time.monotonic()
    outcomes([server.url + "/moved"], rate=10)
    assert [moment - begun >= number / 10 for number, moment in enumerate(server.moments)] == [True] * 3


@pytest.mark.parametrize("fault", [Reply(status=500), Reply(status=502), Reply(status=504), Reply(status=408),
                                   Reply(status=429), Reply(status=503), Reply(png(0), cut=50)])
def test_temporary_faults_are_retried_after_growing_pauses(server, fault):
    address = server.serve("/image", fault, fault, fault, Reply(png(0)))
    assert gives(address, "fetched")
    pauses = [later - earlier for earlier, later in zip(server.moments[:-1], server.moments[1:], strict=True)]
    assert [pause >= least for pause, least in zip(pauses, (0.02, 0.04, 0.08), strict=True)] == [True] * 3


def test_a_lasting_fault_ends_after_four_attempts(server):
    address = server.serve("/image", Reply(status=500))
    assert gives(address, "unreachable", 500)
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_final(server, status):
    assert gives(server.serve("/image", Reply(status=status)), "unreachable", status)
    assert len(server.asked) == 1


def test_a_silent_server_times_out_and_is_retried(server, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", (1, 0.1))
    address = server.serve_images(1)[0]
    server.seconds = 0.5
    assert gives(address, "unreachable", 0.1)
    assert len(server.moments) == 4


@pytest.mark.parametrize("named", [lambda: "1", lambda: formatdate(time.time() + 3, usegmt=True)],
                         ids=["seconds", "date"])
def test_a_requested_pause_holds_for_all_addresses_of_the_host(server, named):
    first, *others = server.serve_images(5)
    server.serve("/0.png", Reply(status=429, headers={"Retry-After": named()}), Reply(png(0)))
    results = outcomes([first, *others], rate=100)
    assert {status for status, _ in results.values()} == {"fetched"}
    # Requests that were under way may still arrive; then the pause holds for the rest.
    moments = sorted(server.moments)
    longest = max(later - earlier for earlier, later in zip(moments[:-1], moments[1:], strict=True))
    assert longest >= 0.9


def test_a_host_with_too_long_a_pause_is_abandoned(server):
    first, *others = server.serve_images(30)
    server.serve("/0.png", Reply(status=503, headers={"Retry-After": "3600"}))
    results = outcomes([first, *others], rate=100)
    closed = [address for address, (status, detail) in results.items() if mentions(detail, 3600)]
    assert first in closed
    assert len(closed) > 20
    assert len(server.asked) == 30 - len(closed) + 1


def test_a_silent_host_is_abandoned_after_some_attempts(server, monkeypatch):
    monkeypatch.setattr(http, "SILENT_ATTEMPTS", 6)
    dead = closed_port()
    addresses = [f"{dead}/{number}.png" for number in range(200)]
    live = server.serve_images(3)
    results = outcomes([*addresses, *live])
    assert {results[address] for address in live} == {("fetched", "")}
    assert {results[address][0] for address in addresses} == {"unreachable"}
    assert mentions(results[addresses[-1]][1], dead.removeprefix("http://"), os.strerror(errno.ECONNREFUSED))


def test_every_address_gets_exactly_one_answer(server):
    rng, faults = random.Random(0), [Reply(status=500), Reply(status=404), Reply(png(0), cut=30), Reply(status=429),
                                     Reply(status=302, headers={"Location": "/0.png"}), Reply(png(1))]
    addresses = server.serve_images(1)
    for number in range(1, 150):
        addresses.append(server.serve(f"/{number}", *rng.choices(faults, k=3), Reply(png(2))))
    answers = [address for address, _ in Fetcher(addresses, 5000).results()]
    assert sorted(answers) == sorted(addresses)


def test_a_redirect_is_followed(server):
    server.serve("/b", Reply(png(1)))
    for status in (301, 302, 303, 307, 308):
        address = server.serve(f"/a{status}", Reply(status=status, headers={"Location": "/b"}))
        assert gives(address, "fetched")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/image.png", "data:image/png;base64,AAAA",
                                    "http://[bad/"])
def test_a_redirect_to_another_scheme_is_refused(server, target):
    address = server.serve("/a", Reply(status=302, headers={"Location": target}))
    assert gives(address, "bad address")


def test_a_cyclic_redirect_ends(server):
    address = server.serve("/a", Reply(status=302, headers={"Location": "/a"}))
    assert gives(address, "unreachable", 5)
    assert len(server.asked) == 6


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "image.png", "//127.0.0.1/a.png",
                                     "http://", "http://[bad", "http://host:port/", "javascript:alert(1)", "http://a..b/",
                                     "http://" + "a" * 70 + "/"])
def test_an_invalid_web_address_is_not_requested(address):
    assert gives(address, "bad address")


def test_a_body_of_any_length_header_ends_at_the_limit(server, monkeypatch):
    monkeypatch.setattr(http, "MAX_BYTES", 100_000)
    assert gives(server.serve("/told", Reply(b"x" * 100_001)), "too large", 100_001)
    for length in ("untold", "chunked"):
        address = server.serve(f"/{length}", Reply(b"x" * 3_000_000, length=length))
        assert gives(address, "too large", 100_000)
    assert gives(server.serve("/fits", Reply(b"x" * 100_000, length="untold")), "fetched")


def test_a_body_that_never_ends_is_abandoned(server, monkeypatch):
    monkeypatch.setattr(http, "MAX_SECONDS", 0.3)
    server.drip = threading.Event()
    address = server.serve("/drip", Reply(b"x" * 1000))
    begun = time.monotonic()
    assert gives(address, "unreachable", 0.3)
    assert time.monotonic() - begun < 10  # four attempts of 0.3 s
    server.drip.set()


def test_requests_name_the_project_and_ask_for_no_compression(server):
    outcomes(server.serve_images(1))
    [asked] = server.asked
    assert asked.headers["User-Agent"].startswith("semantic-ids/")
    assert asked.headers["Accept-Encoding"] == "identity"


def test_an_early_end_stops_the_requests(server):
    addresses = server.serve_images(50)
    results = Fetcher(addresses, 100).results()
    next(results)
    results.close()
    time.sleep(0.1)
    asked = len(server.asked)
    time.sleep(0.2)
    assert len(server.asked) == asked < 50


def test_uncollected_bodies_do_not_pile_up(server):
    results = Fetcher(server.serve_images(60), 2000).results()
    next(results)
    time.sleep(0.5)
    assert len(server.asked) <= 1 + 2 * 8
    assert len(list(results)) == 59


def test_an_exception_in_a_thread_ends_the_wait(server, monkeypatch):
    def die(session, url):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(http, "ask", die)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(Fetcher(server.serve_images(3), 100).results())


def test_the_compression_of_the_server_is_undone(server):
    import gzip

    address = server.serve("/a", Reply(gzip.compress(png(3)), headers={"Content-Encoding": "gzip"}))
    with requests.Session() as session:
        assert http.ask(session, address) == http.Answer("fetched", body=png(3))
