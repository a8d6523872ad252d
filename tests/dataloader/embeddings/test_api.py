"""The encoder whose model is behind an OpenAI-compatible endpoint."""

import email.utils
import json
import logging
import time

import numpy as np
import pytest

from common.errors import ConfigError, ResourceError
from dataloader import http
from dataloader.embeddings import api
from dataloader.embeddings.api import ApiEncoder
from dataloader.embeddings.encode import BatchFailed
from dataloader.http import RateLimit
from tests.dataloader.endpoint import KEY, Endpoint, vector
from tests.dataloader.helpers import closed_port

pytestmark = pytest.mark.slow


@pytest.fixture
def endpoint(monkeypatch):
    servers = []

    def start(script=lambda number: None) -> Endpoint:
        servers.append(Endpoint(script))
        return servers[-1]

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(api, "PATIENCE", api.PATIENCE._replace(first=0.01))
    monkeypatch.setattr(api, "BATCH", 4)
    yield start
    for server in servers:
        server.close()


TEXTS = ["a" * (n % 5) + "b" * n for n in range(10)]  # three requests


def encode(server: Endpoint, texts: list[str] = TEXTS, rate: float = 1000) -> np.ndarray:
    encoder, done = ApiEncoder("m", server.url, rate), []
    try:
        vectors = encoder.encode(texts, done.append)
    finally:
        encoder.close()
    assert sum(done) == len(texts)
    return vectors


def expected(texts: list[str] = TEXTS) -> np.ndarray:
    return np.array([vector(text) for text in texts], dtype=np.float32)


def check_secret(caplog, *texts: object) -> None:
    for text in (caplog.text, *map(str, texts)):
        assert KEY not in text


def test_rows_come_in_the_order_of_the_texts_whatever_the_order_of_the_answer(endpoint):
    server = endpoint()
    vectors = encode(server)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected())
    assert sorted(body["input"] for body in server.asked) == sorted([TEXTS[:4], TEXTS[4:8], TEXTS[8:]])
    assert set(server.paths) == {"/v1/embeddings"}
    assert {body["model"] for body in server.asked} == {"m"}


def test_the_key_goes_into_the_header_and_nowhere_else(endpoint, caplog):
    caplog.set_level(logging.DEBUG)
    server = endpoint()
    encode(server)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    encoder = ApiEncoder("m", server.url, 1000)
    assert encoder.identity == {"encoder": "api", "url": server.url, "name": "m"}
    check_secret(caplog, server.asked, encoder.identity)


def test_another_endpoint_than_openai_s_needs_no_key(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = endpoint()
    np.testing.assert_array_equal(encode(server), expected())
    assert all("Authorization" not in headers for headers in server.headers)


def test_without_a_key_openai_s_endpoint_is_an_error_before_any_request(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: is not set"):
        ApiEncoder("m", None, 5)


@pytest.mark.parametrize("key", ["sk with spaces", "sk-\nX: y", "sk-é"])
def test_a_key_that_no_header_can_hold_is_an_error_that_does_not_show_it(endpoint, monkeypatch, caplog, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="is not a key") as error:
        ApiEncoder("m", endpoint().url, 5)
    assert key not in str(error.value)


def test_the_address_is_the_flag_s_then_the_environment_s_then_openai_s(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert api.endpoint(None) == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/env/")
    assert api.endpoint(None) == "http://127.0.0.1:9/env"
    assert api.endpoint("https://other/v1/") == "https://other/v1"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://x/v1?key=secret"])
def test_an_address_that_is_none_is_an_error(url):
    with pytest.raises(ConfigError) as error:
        api.endpoint(url)
    assert error.value.exit_code == 2
    assert "--api_url" in str(error.value)
    assert "secret" not in str(error.value)


def test_an_address_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as error:
        api.endpoint("http://me:secret@host/v1")
    assert "secret" not in str(error.value)


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_turns_are_evenly_spaced_and_held_back_on_demand(monkeypatch):
    clock, turns = Clock(), []
    monkeypatch.setattr(http, "time", clock)
    limit = RateLimit(4)
    for number in range(6):
        if number == 3:
            limit.hold(10)
        if number == 5:
            clock.sleep(7)  # nobody asked for so long; that is not made up for
        limit.wait()
        turns.append(clock.now)
    assert turns == [100, 100.25, 100.5, 110.5, 110.75, 117.75]


def test_no_more_requests_a_second_than_allowed(endpoint):
    server = endpoint()
    started = time.monotonic()
    encode(server, ["a"] * 32, rate=40)  # eight requests, 25 ms between them
    assert len(server.asked) == 8
    assert time.monotonic() - started >= 7 * 0.025


def test_a_few_requests_are_in_flight_at_once(endpoint):
    server = endpoint()
    server.slow = 0.15
    encode(server, ["a"] * 40)
    assert 2 <= server.most_busy <= api.IN_FLIGHT


FAULTS = {"429": (429, {}, "slow down"), "500": (500, {}, "oops"), "503": (503, {}, ""), "408": (408, {}, ""),
          "cut": (0, {}, '{"data": [')}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_another_attempt_may_mend_is_asked_again(endpoint, caplog, fault):
    server = endpoint(lambda number: FAULTS[fault] if number in (0, 2) else None)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(encode(server), expected())
    assert len(server.asked) == 5
    assert caplog.text.count("asking again") == 2
    check_secret(caplog)


def test_the_pause_grows_and_patience_ends(endpoint, caplog):
    server = endpoint(lambda number: FAULTS["500"])
    with pytest.raises(ResourceError) as error, caplog.at_level(logging.WARNING):
        encode(server, ["a"])
    assert error.value.exit_code == 5
    assert "status 500: oops (6 attempts)" in error.value.what
    assert server.url in str(error.value)
    assert "goes on from here" in error.value.fix
    assert [f"{pause:.1f} s" for pause in (0.01, 0.02, 0.04, 0.08, 0.16)] == [
        record.getMessage().split("again in ")[1] for record in caplog.records]
    gaps = np.diff(server.times)
    assert (gaps >= [0.01, 0.02, 0.04, 0.08, 0.16]).all()


def test_a_server_that_does_not_answer_in_time_is_asked_again(endpoint, monkeypatch):
    monkeypatch.setattr(api, "TIMEOUT", (5, 0.1))
    server = endpoint(lambda number: time.sleep(0.4) if number == 0 else None)
    np.testing.assert_array_equal(encode(server, ["a", "bb"]), expected(["a", "bb"]))
    assert len(server.asked) == 2


def test_nobody_there_is_an_error_with_the_address(endpoint):
    url = closed_port()
    with pytest.raises(ResourceError, match="cannot connect") as error:
        ApiEncoder("m", url, 1000).encode(["a"], lambda count: None)
    assert error.value.exit_code == 5
    assert url in str(error.value)


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_a_wait_that_the_server_asks_for_holds_all_requests(endpoint, how):
    def script(number):
        value = "1" if how == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        return (429, {"Retry-After": value}, "") if number == 0 else None

    server = endpoint(script)
    np.testing.assert_array_equal(encode(server), expected())
    later = [moment - server.times[0] for moment in server.times[3:]]  # three were in flight
    assert min(later) >= (0.95 if how == "seconds" else 0.5)


def test_a_server_that_asks_for_a_long_wait_is_left_alone(endpoint):
    server = endpoint(lambda number: (429, {"Retry-After": "3600"}, "quota"))
    with pytest.raises(ResourceError, match="wait for 3600 s"):
        encode(server, ["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_an_error_at_once_that_does_not_show_it(endpoint, caplog, status):
    server = endpoint(lambda number: (status, {}, f"Incorrect API key provided: {KEY}"))
    with pytest.raises(ConfigError) as error:
        encode(server, ["a"])
    assert error.value.exit_code == 2
    assert f"$OPENAI_API_KEY: {server.url} refuses it (status {status})" in str(error.value)
    assert len(server.asked) == 1
    check_secret(caplog, error.value)


def test_an_endpoint_that_wants_a_key_says_so(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="is not set, and .* wants one"):
        encode(endpoint(lambda number: (401, {}, "")), ["a"])


@pytest.mark.parametrize("status", [404, 301])
def test_no_such_endpoint_or_model_is_an_error_at_once(endpoint, status):
    server = endpoint(lambda number: (status, {"Location": "http://127.0.0.1:9/"}, "The model `m` does not exist"))
    with pytest.raises(ResourceError) as error:
        encode(server, ["a"])
    assert error.value.exit_code == 5
    assert f"{server.url}/embeddings: status {status}: The model `m` does not exist" in str(error.value)
    assert "--api_url" in error.value.fix
    assert len(server.asked) == 1


def test_texts_that_the_server_refuses_are_named_with_what_it_says(endpoint, caplog):
    server = endpoint(lambda number: (400, {}, f"maximum context length is 8192 ({KEY})"))
    with pytest.raises(BatchFailed) as error:
        encode(server, ["a"] * 3)
    assert list(error.value.rows) == [0, 1, 2]
    assert "status 400: maximum context length is 8192 (***)" in error.value.why
    assert len(server.asked) == 1
    check_secret(caplog, error.value)


def answer(*rows: object) -> str:
    return json.dumps({"data": list(rows)})


def row(index: object, *values: object) -> dict:
    return {"index": index, "embedding": list(values)}


@pytest.mark.parametrize(("text", "words"), [
    ("<html>log in</html>", "no list of vectors: '<html>log in</html>'"),
    ("[]", "no list of vectors"),
    ('{"data": 3}', "no list of vectors"),
    ('{"data": [{"index": 0}]}', "no list of vectors"),
    (answer({"index": 0, "embedding": "AACAPw=="}, row(1, 1.0)), "no list of vectors"),
    (answer({"index": 0, "embedding": [None]}, row(1, 1.0)), "no list of vectors|not finite"),
    (answer(row(0, 1.0, 2.0)), "1 vectors for 2 texts"),
    (answer(row(0, 1.0), row(1, 1.0), row(2, 1.0)), "3 vectors for 2 texts"),
    (answer(row(0, 1.0), row(0, 1.0)), "index is not 0 to 1"),
    (answer(row(1, 1.0), row(2, 1.0)), "index is not 0 to 1"),
    (answer(row(0, 1.0, 2.0), row(1, 1.0)), "different lengths"),
    (answer(row(0), row(1)), "different lengths"),
    (answer(row(0, [1.0]), row(1, [1.0])), "different lengths"),
    ('{"data": [{"index": 0, "embedding": [NaN]}, {"index": 1, "embedding": [1]}]}', "not finite"),
    (answer(row(0, 1e300), row(1, 1.0)), "not finite"),
    (answer(row(0, 10**400), row(1, 1.0)), "no list of vectors"),
])
def test_an_answer_that_is_none_fails_at_once_and_says_why(endpoint, text, words):
    server = endpoint(lambda number: (200, {}, text))
    with pytest.raises(BatchFailed, match=words) as error:
        encode(server, ["a", "bb"])
    assert list(error.value.rows) == [0, 1]
    assert len(server.asked) == 1


def test_answers_that_agree_with_themselves_but_not_with_each_other_fail(endpoint):
    server = endpoint(lambda number: (200, {}, answer(*(row(i, *[1.0] * (2 + number)) for i in range(4)))))
    with pytest.raises(BatchFailed, match="different lengths"):
        encode(server, ["a"] * 8)


def test_a_request_that_another_one_s_failure_has_made_useless_is_not_repeated(endpoint, monkeypatch):
    monkeypatch.setattr(api, "PATIENCE", api.PATIENCE._replace(first=0.3))
    server = endpoint(lambda number: FAULTS["500"] if number == 0 else (400, {}, "no"))
    with pytest.raises(BatchFailed):
        encode(server, ["a"] * 8)
    time.sleep(0.5)
    assert len(server.asked) == 2
