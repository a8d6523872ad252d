"""The encoder that asks an OpenAI-compatible endpoint."""

import email.utils
import errno
import json
import logging
import os
import re
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
from tests.dataloader.helpers import closed_port, mentions
from tests.errors import refused

pytestmark = pytest.mark.slow

KEY_PLACE = "$OPENAI_API_KEY"


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


def test_rows_keep_the_order_of_the_texts(endpoint):
    server = endpoint()
    vectors = encode(server)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected())
    assert sorted(body["input"] for body in server.asked) == sorted([TEXTS[:4], TEXTS[4:8], TEXTS[8:]])
    assert set(server.paths) == {"/v1/embeddings"}
    assert {body["model"] for body in server.asked} == {"m"}


def test_the_key_is_in_the_header_alone(endpoint, caplog):
    caplog.set_level(logging.DEBUG)
    server = endpoint()
    encode(server)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    encoder = ApiEncoder("m", server.url, 1000)
    assert encoder.identity == {"encoder": "api", "url": server.url, "name": "m"}
    check_secret(caplog, server.asked, encoder.identity)


def test_other_endpoints_than_openai_need_no_key(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = endpoint()
    np.testing.assert_array_equal(encode(server), expected())
    assert all("Authorization" not in headers for headers in server.headers)


def test_openai_without_a_key_is_refused(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with refused(ConfigError, KEY_PLACE, names=[api.OPENAI], fix=["export OPENAI_API_KEY=", "--api_url"]):
        ApiEncoder("m", None, 5)


@pytest.mark.parametrize("key", ["sk with spaces", "sk-\nX: y", "sk-é"])
def test_a_malformed_key_is_refused_and_not_shown(endpoint, monkeypatch, caplog, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with refused(ConfigError, KEY_PLACE) as error:
        ApiEncoder("m", endpoint().url, 5)
    assert key not in str(error.value)


def test_the_flag_overrides_the_environment_and_the_default_address(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert api.endpoint(None) == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/env/")
    assert api.endpoint(None) == "http://127.0.0.1:9/env"
    assert api.endpoint("https://other/v1/") == "https://other/v1"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://x/v1?key=secret"])
def test_an_invalid_address_is_refused(url):
    with refused(ConfigError, "--api_url") as error:
        api.endpoint(url)
    assert "secret" not in str(error.value)


def test_an_address_with_a_password_is_refused_without_showing_it():
    with refused(ConfigError, "--api_url", fix=["OPENAI_API_KEY"]) as error:
        api.endpoint("http://me:secret@host/v1")
    assert "secret" not in str(error.value)


class Clock:
    """Time that passes only during `sleep`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_turns_are_evenly_spaced_and_can_be_delayed(monkeypatch):
    clock, turns = Clock(), []
    monkeypatch.setattr(http, "time", clock)
    limit = RateLimit(4)
    for number in range(6):
        if number == 3:
            limit.hold(10)
        if number == 5:
            clock.sleep(7)  # unused turns are lost
        limit.wait()
        turns.append(clock.now)
    assert turns == [100, 100.25, 100.5, 110.5, 110.75, 117.75]


def test_the_request_rate_is_limited(endpoint):
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
def test_temporary_faults_are_retried(endpoint, caplog, fault):
    server = endpoint(lambda number: FAULTS[fault] if number in (0, 2) else None)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(encode(server), expected())
    assert len(server.asked) == 5
    assert len([message for message in caplog.messages if server.url in message]) == 2
    check_secret(caplog)


def test_pauses_grow_and_attempts_end(endpoint, caplog):
    server = endpoint(lambda number: FAULTS["500"])
    with refused(ResourceError, server.url, fix=["--api_url"]) as error, caplog.at_level(logging.WARNING):
        encode(server, ["a"])
    assert mentions(error.value.what, 500, "oops", 6)
    assert [f"{pause:.1f}" for pause in (0.01, 0.02, 0.04, 0.08, 0.16)] == [
        re.findall(r"(?<![\d.])\d+\.\d(?![\d.])", message)[-1] for message in caplog.messages]
    gaps = np.diff(server.times)
    assert (gaps >= [0.01, 0.02, 0.04, 0.08, 0.16]).all()


def test_a_request_without_an_answer_in_time_is_retried(endpoint, monkeypatch):
    monkeypatch.setattr(api, "TIMEOUT", (5, 0.1))
    server = endpoint(lambda number: time.sleep(0.4) if number == 0 else None)
    np.testing.assert_array_equal(encode(server, ["a", "bb"]), expected(["a", "bb"]))
    assert len(server.asked) == 2


def test_an_unreachable_server_is_an_error_with_its_address(endpoint):
    url = closed_port()
    with refused(ResourceError, url, names=[os.strerror(errno.ECONNREFUSED)]):
        ApiEncoder("m", url, 1000).encode(["a"], lambda count: None)


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_retry_after_delays_all_requests(endpoint, how):
    def script(number):
        value = "1" if how == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        return (429, {"Retry-After": value}, "") if number == 0 else None

    server = endpoint(script)
    np.testing.assert_array_equal(encode(server), expected())
    later = [moment - server.times[0] for moment in server.times[3:]]  # three were in flight
    assert min(later) >= (0.95 if how == "seconds" else 0.5)


def test_a_very_long_retry_after_ends_the_run(endpoint):
    server = endpoint(lambda number: (429, {"Retry-After": "3600"}, "quota"))
    with refused(ResourceError, server.url, names=[429, "quota", 3600]):
        encode(server, ["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_fails_at_once_and_is_not_shown(endpoint, caplog, status):
    server = endpoint(lambda number: (status, {}, f"Incorrect API key provided: {KEY}"))
    with refused(ConfigError, KEY_PLACE, names=[server.url, status], fix=["export OPENAI_API_KEY="]) as error:
        encode(server, ["a"])
    assert len(server.asked) == 1
    check_secret(caplog, error.value)


def test_a_missing_key_differs_from_a_rejected_key(endpoint, monkeypatch):
    server, messages = endpoint(lambda number: (401, {}, "")), set()
    for key in ("", KEY):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with refused(ConfigError, KEY_PLACE, names=[server.url, 401], fix=["export OPENAI_API_KEY="]) as error:
            encode(server, ["a"])
        messages.add(str(error.value))
    assert len(messages) == 2  # a missing key is not called a wrong one


@pytest.mark.parametrize("status", [404, 301])
def test_an_unknown_endpoint_or_model_fails_at_once(endpoint, status):
    server = endpoint(lambda number: (status, {"Location": "http://127.0.0.1:9/"}, "The model `m` does not exist"))
    with refused(ResourceError, f"{server.url}/embeddings", names=[status, "The model `m` does not exist", "'m'"],
                 fix=["--api_url", "--text_model api:<name>"]):
        encode(server, ["a"])
    assert len(server.asked) == 1


def test_rejected_texts_are_named_with_the_server_message(endpoint, caplog):
    server = endpoint(lambda number: (400, {}, f"maximum context length is 8192 ({KEY})"))
    with pytest.raises(BatchFailed) as error:
        encode(server, ["a"] * 3)
    assert list(error.value.rows) == [0, 1, 2]
    assert mentions(error.value.why, server.url, 400)
    assert "maximum context length is 8192 (***)" in error.value.why
    assert len(server.asked) == 1
    check_secret(caplog, error.value)


def answer(*rows: object) -> str:
    return json.dumps({"data": list(rows)})


def row(index: object, *values: object) -> dict:
    return {"index": index, "embedding": list(values)}


@pytest.mark.parametrize(("text", "values"), [  # None: the error quotes the answer
    ("<html>log in</html>", None),
    ("[]", None),
    ('{"data": 3}', None),
    ('{"data": [{"index": 0}]}', None),
    (answer({"index": 0, "embedding": "AACAPw=="}, row(1, 1.0)), None),
    (answer({"index": 0, "embedding": [None]}, row(1, 1.0)), ()),
    (answer(row(0, 1.0, 2.0)), (1, 2)),                            # vectors and texts
    (answer(row(0, 1.0), row(1, 1.0), row(2, 1.0)), (3, 2)),
    (answer(row(0, 1.0), row(0, 1.0)), (0, 1)),                    # the first and the last index
    (answer(row(1, 1.0), row(2, 1.0)), (0, 1)),
    (answer(row(0, 1.0, 2.0), row(1, 1.0)), ()),
    (answer(row(0), row(1)), ()),
    (answer(row(0, [1.0]), row(1, [1.0])), ()),
    ('{"data": [{"index": 0, "embedding": [NaN]}, {"index": 1, "embedding": [1]}]}', ()),
    (answer(row(0, 1e300), row(1, 1.0)), ()),
    (answer(row(0, 10**400), row(1, 1.0)), None),
])
def test_an_invalid_answer_fails_at_once(endpoint, text, values):
    server = endpoint(lambda number: (200, {}, text))
    with pytest.raises(BatchFailed) as error:
        encode(server, ["a", "bb"])
    assert mentions(error.value.why, server.url, *(values or ()))
    assert (repr(text[:80]) in error.value.why) == (values is None)
    assert list(error.value.rows) == [0, 1]
    assert len(server.asked) == 1


def test_answers_of_different_lengths_fail(endpoint):
    server = endpoint(lambda number: (200, {}, answer(*(row(i, *[1.0] * (2 + number)) for i in range(4)))))
    with pytest.raises(BatchFailed) as error:
        encode(server, ["a"] * 8)
    assert mentions(error.value.why, server.url)
    assert list(error.value.rows) == list(range(8))


def test_requests_stop_after_another_request_failed(endpoint, monkeypatch):
    monkeypatch.setattr(api, "PATIENCE", api.PATIENCE._replace(first=0.3))
    server = endpoint(lambda number: FAULTS["500"] if number == 0 else (400, {}, "no"))
    with pytest.raises(BatchFailed):
        encode(server, ["a"] * 8)
    time.sleep(0.5)
    assert len(server.asked) == 2
