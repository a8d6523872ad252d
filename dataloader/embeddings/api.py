"""Vectors from an endpoint that speaks OpenAI's protocol: POST <url>/embeddings."""

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
BATCH = 64           # texts a request
SHARD = 1024         # texts between two writes to the disk
IN_FLIGHT = 4        # requests
TIMEOUT = (10, 120)  # seconds to connect, and of silence
PATIENCE = RetryPolicy(attempts=6, first=1.0, longest=120.0)
CONTINUE = "the same command again goes on from here; what is encoded is kept"


class ApiEncoder:
    """The model `name` at an endpoint. Raises ConfigError for a wrong address, and for a missing key."""

    unit, flag, shard_size = "texts", "--text_model", SHARD

    def __init__(self, name: str, url: str | None, rate: float):
        self.name, self.url, self.limit = name, endpoint(url), RateLimit(rate)
        self.identity = {"encoder": "api", "url": self.url, "name": name}
        self._key = os.environ.get(KEY_NAME, "").strip()
        if not self._key and self.url == OPENAI:
            raise ConfigError(f"${KEY_NAME}", "is not set", f"{OPENAI} wants a key",
                              f"export {KEY_NAME}=…, or --api_url URL")
        if not re.fullmatch(r"[\x21-\x7e]*", self._key):
            raise ConfigError(f"${KEY_NAME}", "is not a key", "it holds spaces or signs that are not ASCII",
                              "correct it")
        self._session = requests.Session()
        self._session.auth = self._authorize  # set even without a key, so that no other one is looked up
        self._closed = threading.Event()

    def encode(self, texts: list[str], done: Callable[[int], None]) -> np.ndarray:
        """float32 (len(texts), D). Raises BatchFailed; ResourceError where the server cannot be had; ConfigError."""
        batches = [(texts[start:start + BATCH], start) for start in range(0, len(texts), BATCH)]
        parts: dict[int, np.ndarray] = {}
        # Its threads are daemons: a command that is stopped waits for no answer. Out of order, so that a failure is
        # seen while others are still asking again.
        with ThreadPool(min(IN_FLIGHT, len(batches))) as pool:
            for start, part in pool.imap_unordered(self._encode_batch, batches):
                parts[start] = part
                done(len(part))
        if len({part.shape[1] for part in parts.values()}) > 1:
            raise BatchFailed(range(len(texts)), f"{self.url} gives vectors of different lengths")
        return np.concatenate([parts[start] for start in sorted(parts)])

    def close(self) -> None:
        self._closed.set()  # a request that another one's failure has made useless is not repeated
        self._session.close()

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _encode_batch(self, batch: tuple[list[str], int]) -> tuple[int, np.ndarray]:
        texts, start = batch

        def tell(failed: TemporaryFailure, pause: float) -> bool:
            log.warning("embed: %s: %s; asking again in %.1f s", self.url, failed, pause)
            return False

        try:
            rows = range(start, start + len(texts))
            return start, retry(lambda: self._ask(texts, rows), PATIENCE, self._closed, tell)
        except PermanentFailure as refused:
            raise ResourceError(self.url, str(refused), "The endpoint cannot be had",
                                f"check the network and --api_url, or wait; {CONTINUE}") from refused

    def _ask(self, texts: list[str], rows: range) -> np.ndarray:
        """One request. Raises Failed, or what is wrong where another attempt would not mend it."""
        self.limit.wait()
        try:
            with answered(self._session, "POST", f"{self.url}/embeddings", TIMEOUT, allow_redirects=False,
                          json={"model": self.name, "input": texts}) as response:
                response.content  # noqa: B018 (reads it to the end)
            status = response.status_code
            said = "" if status == 200 else self._without_key(" ".join(response.text[:1000].split()))[:200]
            if is_retryable(status):
                raise TemporaryFailure(f"status {status}: {said}", response)
        except TemporaryFailure as failed:
            self.limit.hold(min(failed.wait, PATIENCE.longest))  # it is meant for all requests
            raise
        if status in (401, 403):  # what it says may quote the key
            raise ConfigError(f"${KEY_NAME}", f"{self.url} refuses it (status {status})" if self._key else
                              f"is not set, and {self.url} wants one (status {status})",
                              fix=f"export {KEY_NAME}=… with a key of that endpoint")
        if status == 404 or 300 <= status < 400:
            raise ResourceError(f"{self.url}/embeddings", f"status {status}: {said}",
                                f"There is no such endpoint, or no model {self.name!r} behind it",
                                "correct --api_url (it ends before /embeddings) or --text_model api:<name>")
        if status != 200:
            raise BatchFailed(rows, f"{self.url} answers with status {status}: {said}")
        try:
            return parse_answer(response, len(texts))
        except ValueError as error:
            raise BatchFailed(rows, f"{self.url} gives {self._without_key(str(error))}") from error

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def endpoint(url: str | None) -> str:
    """The address that the flag, the environment or the default gives. Raises ConfigError where it is none."""
    where, url = ("--api_url", url) if url else ("$OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL") or OPENAI)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(where, "is not an address such as https://host/v1", "without a query, and ending before "
                          "/embeddings", "correct it")
    if parts.username or parts.password:
        raise ConfigError(where, "holds a user's name or password", "it would be written into artifacts",
                          f"give a key as {KEY_NAME} instead")
    return url.rstrip("/")


def parse_answer(response: requests.Response, num_texts: int) -> np.ndarray:
    """float32 (num_texts, D), in the order of `index`. Raises ValueError that says what is wrong with the answer."""
    try:
        rows = response.json()["data"]
        with np.errstate(over="ignore"):  # what float32 cannot hold is found below
            vectors = {row["index"]: np.array(row["embedding"], dtype=np.float32) for row in rows}
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"no list of vectors: {' '.join(response.text[:80].split())!r}") from error
    if len(rows) != num_texts:
        raise ValueError(f"{len(rows)} vectors for {num_texts} texts")
    if set(vectors) != set(range(num_texts)):
        raise ValueError(f"vectors whose index is not 0 to {num_texts - 1}, each once")
    shapes = {vector.shape for vector in vectors.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape == (0,) for shape in shapes):
        raise ValueError("vectors of different lengths")
    stacked = np.stack([vectors[number] for number in range(num_texts)])
    if not np.isfinite(stacked).all():
        raise ValueError("numbers that are not finite")
    return stacked
