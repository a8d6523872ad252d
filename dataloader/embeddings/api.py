"""Text embeddings from an OpenAI-compatible endpoint: POST <url>/embeddings."""

import logging
import os
import re
import threading
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

import numpy as np
import requests

from common.errors import ConfigError, ResourceError
from dataloader.embeddings.encode import BatchFailed
from dataloader.http import PermanentFailure, RateLimit, RetryPolicy, TemporaryFailure, answered, is_retryable, retry

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
KEY_NAME = "OPENAI_API_KEY"
BATCH = 64           # texts per request
SHARD = 1024         # texts per shard of the cache
IN_FLIGHT = 4        # maximum number of requests at the same time
TIMEOUT = (10, 120)  # maximum seconds to connect, and maximum seconds without receiving data
PATIENCE = RetryPolicy(attempts=6, first=1.0, longest=120.0)
CONTINUE = "then run the same command again; the texts that are already encoded are kept"


class ApiEncoder:
    """An encoder of texts with the model `name` of an endpoint. `rate` is the maximum number of requests per second.

    Raises ConfigError if the URL or the API key is invalid, or if OpenAI's own endpoint is used without a key.
    """

    unit, flag, shard_size = "texts", "--text_model", SHARD

    def __init__(self, name: str, url: str | None, rate: float):
        self.name, self.url, self.limit = name, endpoint(url), RateLimit(rate)
        self.identity = {"encoder": "api", "url": self.url, "name": name}
        self._key = os.environ.get(KEY_NAME, "").strip()
        if not self._key and self.url == OPENAI:
            raise ConfigError(f"${KEY_NAME}", "is not set", f"The endpoint {OPENAI} requires a key",
                              f"export {KEY_NAME}=…, or use another endpoint with --api_url URL")
        if not re.fullmatch(r"[\x21-\x7e]*", self._key):
            raise ConfigError(f"${KEY_NAME}", "is not a valid key", "It contains spaces or non-ASCII characters",
                              "correct the key")
        self._session = requests.Session()
        self._session.auth = self._authorize  # set even without a key; requests would otherwise read ~/.netrc
        self._closed = threading.Event()

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """Encode the texts: float32 (len(texts), D).

        Raises BatchFailed if the endpoint rejects a batch or returns invalid vectors. Raises ResourceError if the
        endpoint is not available. Raises ConfigError if the endpoint does not accept the key.
        """
        batches = [(texts[start:start + BATCH], start) for start in range(0, len(texts), BATCH)]
        parts: dict[int, np.ndarray] = {}
        # The threads of a ThreadPool are daemons, so an interrupted command does not wait for responses. The results
        # are unordered, so a failed batch raises its error at once, even while other batches are still being retried.
        with ThreadPool(min(IN_FLIGHT, len(batches))) as pool:
            for start, part in pool.imap_unordered(self._encode_batch, batches):
                parts[start] = part
                done(len(part))
        if len({part.shape[1] for part in parts.values()}) > 1:
            raise BatchFailed(range(len(texts)), f"{self.url} returned vectors of different lengths")
        return np.concatenate([parts[start] for start in sorted(parts)])

    def close(self) -> None:
        self._closed.set()  # after one request has failed, this stops the retries of the other requests
        self._session.close()

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _encode_batch(self, batch: tuple[list[str], int]) -> tuple[int, np.ndarray]:
        texts, start = batch

        def on_failure(failure: TemporaryFailure, pause: float) -> bool:
            log.warning("embed: %s: %s; retrying in %.1f s", self.url, failure, pause)
            return False

        try:
            rows = range(start, start + len(texts))
            return start, retry(lambda: self._ask(texts, rows), PATIENCE, self._closed, on_failure)
        except PermanentFailure as failure:
            raise ResourceError(self.url, str(failure), "The endpoint is not available",
                                f"check the network and --api_url, or wait; {CONTINUE}") from failure

    def _ask(self, texts: list[str], rows: range) -> np.ndarray:
        """Send one request, and return the vectors of its texts. `rows` are the positions of the texts in the shard.

        Raises TemporaryFailure if a retry may help, and another exception otherwise.
        """
        self.limit.wait()
        try:
            with answered(self._session, "POST", f"{self.url}/embeddings", TIMEOUT, allow_redirects=False,
                          json={"model": self.name, "input": texts}) as response:
                response.content  # noqa: B018 (reads the whole body)
            status = response.status_code
            message = "" if status == 200 else self._without_key(" ".join(response.text[:1000].split()))[:200]
            if is_retryable(status):
                raise TemporaryFailure(f"HTTP {status}: {message}", response)
        except TemporaryFailure as failure:
            self.limit.hold(min(failure.wait, PATIENCE.longest))  # the pause applies to all requests
            raise
        if status in (401, 403):  # do not show the response, because it may quote the key
            raise ConfigError(f"${KEY_NAME}", f"was rejected by {self.url} (HTTP {status})" if self._key else
                              f"is not set, but {self.url} requires a key (HTTP {status})",
                              fix=f"export {KEY_NAME}=… with a key for that endpoint")
        if status == 404 or 300 <= status < 400:
            raise ResourceError(f"{self.url}/embeddings", f"HTTP {status}: {message}",
                                f"Either the URL is wrong, or the endpoint does not have the model {self.name!r}",
                                "correct --api_url (without /embeddings at its end) or --text_model api:<name>")
        if status != 200:
            raise BatchFailed(rows, f"{self.url} responded with HTTP {status}: {message}")
        try:
            return parse_answer(response, len(texts))
        except ValueError as error:
            raise BatchFailed(rows, f"{self.url} returned {self._without_key(str(error))}") from error

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def endpoint(url: str | None) -> str:
    """Return the URL of the endpoint: --api_url, else $OPENAI_BASE_URL, else OpenAI's own.

    Raises ConfigError if the URL is invalid or contains a password.
    """
    where, url = ("--api_url", url) if url else ("$OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL") or OPENAI)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(where, "is not a URL such as https://host/v1", "The URL must not contain a query, and "
                          "must not end with /embeddings", "correct the URL")
    if parts.username or parts.password:
        raise ConfigError(where, "must not contain a user name or password", "The URL is written to meta files",
                          f"remove them from the URL, and put the key into ${KEY_NAME}")
    return url.rstrip("/")


def parse_answer(response: requests.Response, num_texts: int) -> np.ndarray:
    """Return the vectors of a response, sorted by their `index`: float32 (num_texts, D).

    Raises ValueError if the response does not contain one valid vector per text.
    """
    try:
        rows = response.json()["data"]
        with np.errstate(over="ignore"):  # values that overflow are rejected below
            vectors = {row["index"]: np.array(row["embedding"], dtype=np.float32) for row in rows}
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"no list of vectors: {' '.join(response.text[:80].split())!r}") from error
    if len(rows) != num_texts:
        raise ValueError(f"{len(rows)} vectors for {num_texts} texts")
    if set(vectors) != set(range(num_texts)):
        raise ValueError(f"vectors whose indices are not 0 to {num_texts - 1}")
    shapes = {vector.shape for vector in vectors.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape == (0,) for shape in shapes):
        raise ValueError("vectors of different lengths")
    stacked = np.stack([vectors[number] for number in range(num_texts)])
    if not np.isfinite(stacked).all():
        raise ValueError("numbers that are not finite")
    return stacked
