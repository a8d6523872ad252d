"""Vectors from an endpoint that speaks OpenAI's protocol: POST <url>/embeddings."""

import email.utils
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

import numpy as np
import requests

from common.errors import ConfigError, ResourceError
from dataloader.encoders import BatchFailed

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
KEY_NAME = "OPENAI_API_KEY"
BATCH = 64           # texts a request
SHARD = 1024         # texts between two writes to the disk
IN_FLIGHT = 4        # requests
TIMEOUT = (10, 120)  # seconds to connect, and of silence
ATTEMPTS = 6         # of a request
PAUSE = 1.0          # seconds before the second attempt; before each further one twice as long
LONGEST_PAUSE = 120  # seconds; a server that asks for more is left alone
AGAIN = (408, 409, 425, 429)  # beside 5xx: another time the answer may be better
CONTINUE = "the same command again goes on from here; what is encoded is kept"


class ApiEncoder:
    """The embedding model `name` behind an endpoint; the texts' length is the server's business.

    Raises ConfigError for an address that is none, or without a key where one is needed. The key is sent to the
    endpoint, and appears nowhere else.
    """

    unit, flag, shard_size = "texts", "--text_model", SHARD

    def __init__(self, name: str, url: str | None, rate: float):
        self.name, self.url, self.limit = name, endpoint(url), RateLimit(rate)
        self.identity = {"encoder": "api", "url": self.url, "name": name}
        self._key = _read_key(self.url)
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
        response = self._answer(texts, start)
        try:
            return start, parse_answer(response, len(texts))
        except ValueError as error:
            raise BatchFailed(range(start, start + len(texts)),
                              f"{self.url} gives {self._without_key(str(error))}") from error

    def _answer(self, texts: list[str], start: int) -> requests.Response:
        """The first answer with status 200; asked again, with growing pauses, where that may help."""
        for attempt in range(1, ATTEMPTS + 1):
            self.limit.wait()
            response, fault, pause = self._ask(texts)
            if response is not None and response.status_code == 200:
                return response
            if response is not None and not _may_recover(response):
                raise self._refusal(response, range(start, start + len(texts)))
            if pause > LONGEST_PAUSE:
                raise ResourceError(self.url, fault, f"It asks to wait for {pause:.0f} s", f"later: {CONTINUE}")
            if attempt < ATTEMPTS:
                pause = pause or PAUSE * 2 ** (attempt - 1)
                log.warning("embed: %s: %s; asking again in %.1f s", self.url, fault, pause)
                if self._closed.wait(pause):
                    break
        raise ResourceError(self.url, f"{fault} ({ATTEMPTS} attempts)", "The endpoint cannot be had",
                            f"check the network and --api_url; {CONTINUE}")

    def _ask(self, texts: list[str]) -> tuple[requests.Response | None, str, float]:
        """One request: the whole answer if there is one, what is wrong with it, and the pause that the server wants."""
        try:
            response = self._session.post(f"{self.url}/embeddings", json={"model": self.name, "input": texts},
                                          timeout=TIMEOUT, allow_redirects=False)
        except requests.Timeout:
            return None, "no answer in time", 0.0
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            return None, f"the connection failed ({type(error).__name__})", 0.0
        pause = _retry_after(response) if response.status_code != 200 else 0.0
        if pause:
            self.limit.hold(min(pause, LONGEST_PAUSE))  # it is meant for all requests
        return response, f"status {response.status_code}: {self._excerpt(response)}", pause

    def _refusal(self, response: requests.Response, rows: range) -> Exception:
        status = response.status_code
        if status in (401, 403):  # what it says may quote the key
            return ConfigError(f"${KEY_NAME}", f"{self.url} refuses it (status {status})" if self._key else
                               f"is not set, and {self.url} wants one (status {status})",
                               fix=f"export {KEY_NAME}=… with a key of that endpoint")
        if status == 404 or 300 <= status < 400:
            return ResourceError(f"{self.url}/embeddings", f"status {status}: {self._excerpt(response)}",
                                 f"There is no such endpoint, or no model {self.name!r} behind it",
                                 "correct --api_url (it ends before /embeddings) or --text_model api:<name>")
        return BatchFailed(rows, f"{self.url} answers with status {status}: {self._excerpt(response)}")

    def _excerpt(self, response: requests.Response) -> str:
        return self._without_key(" ".join(response.text[:1000].split()))[:200]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class RateLimit:
    """So many requests a second from all threads together, evenly spaced."""

    def __init__(self, per_second: float):
        self.distance, self.next, self.lock = 1 / per_second, 0.0, threading.Lock()

    def wait(self) -> None:
        """Sleep until it is the caller's turn."""
        with self.lock:
            turn = max(time.monotonic(), self.next)
            self.next = turn + self.distance
        time.sleep(max(0.0, turn - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Give out no turn for so long."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


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


def _read_key(url: str) -> str:
    key = os.environ.get(KEY_NAME, "").strip()
    if not key and url == OPENAI:
        raise ConfigError(f"${KEY_NAME}", "is not set", f"{url} wants a key", f"export {KEY_NAME}=…, or --api_url URL")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ConfigError(f"${KEY_NAME}", "is not a key", "it holds spaces or signs that are not ASCII", "correct it")
    return key


def _may_recover(response: requests.Response) -> bool:
    return response.status_code >= 500 or response.status_code in AGAIN


def _retry_after(response: requests.Response) -> float:
    """The seconds that the server asks to wait, as a number or a date; 0 if it does not say."""
    value = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


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
