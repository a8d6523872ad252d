"""HTTP requests: classification of failures, retries, rate limits, and the download of many small files."""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from socket import gaierror
from typing import NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

Result = TypeVar("Result")

AGENT = "semantic-ids/1.0 (generative recommendation with semantic IDs; fetches the images of a catalogue once)"
HEADERS = {"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
TIMEOUT = (10.0, 15.0)  # for small files: seconds to connect, and seconds without any data
MAX_BYTES = 20_000_000  # maximum size of the body of one response
MAX_SECONDS = 60        # maximum time to read the body of one response, even if data keeps arriving
CHUNK = 1 << 16
THREADS = 32            # most of them wait for their turn or for the next attempt
AT_ONCE = 8             # requests at the same time
PER_HOST = 4            # requests to one host at the same time
SILENT_ATTEMPTS = 20    # a host that does not respond to this many attempts in a row gets no more requests
MAX_REDIRECTS = 5


class PermanentFailure(Exception):
    """A failure that another attempt cannot fix, such as HTTP 404."""

    def __init__(self, what: str, status: str = "unreachable"):
        super().__init__(what)
        self.status = status  # the status of the resulting Answer


class TemporaryFailure(Exception):
    """A failure that another attempt may fix.

    `wait` is the pause in seconds that the server asks for, or 0 if it does not ask for one.
    """

    def __init__(self, what: str, response: requests.Response | None = None, responded: bool = True):
        super().__init__(what)
        self.wait, self.overloaded = 0.0, False
        self.responded = responded  # whether the host sent any response
        if response is not None:
            self.overloaded = response.status_code in (429, 503)  # applies to all URLs of the host
            with suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
                self.wait = float(urllib3.Retry().get_retry_after(response.raw) or 0)


class NoSuchHost(TemporaryFailure):
    """The host name could not be resolved. Another attempt helps only if the name was resolved earlier in the run."""


class CutOff(TemporaryFailure):
    """The connection ended, or no more data arrived, in the middle of a response."""


class Stopped(Exception):
    """The command was asked to stop. The data received so far is kept."""


class RetryPolicy(NamedTuple):
    """The number of attempts and the pauses between them."""

    attempts: int
    first: float    # seconds before the second attempt; each later pause is twice as long as the one before
    longest: float  # maximum pause in seconds; if the server asks for a longer one, there is no further attempt


def retry(attempt: Callable[[], Result], retry_policy: RetryPolicy, stop: threading.Event,
          on_failure: Callable[[TemporaryFailure, float], bool] = lambda failure, pause: False) -> Result:
    """Call `attempt` until it does not raise TemporaryFailure, and return its result.

    on_failure: called after each failure with the failure and the seconds until the next attempt. Returns whether to
        reset the count of attempts.

    Raises PermanentFailure if the last attempt fails, or if the server asks for a longer pause than the policy allows.
    Raises Stopped if `stop` is set.
    """
    number = 1
    while True:
        try:
            return attempt()
        except TemporaryFailure as failure:
            if failure.wait > retry_policy.longest:
                raise PermanentFailure(f"{failure}; the server asks for a pause of {failure.wait:.0f} s") from failure
            if number >= retry_policy.attempts:
                raise PermanentFailure(f"{failure} ({number} attempts)") from failure
            pause = failure.wait or min(retry_policy.first * 2 ** (number - 1), retry_policy.longest)
            number = 1 if on_failure(failure, pause) else number + 1
        if stop.wait(pause):
            raise Stopped


def is_retryable(status: int) -> bool:
    """Return whether another attempt may succeed after a response with this HTTP status."""
    return status >= 500 or status in (408, 409, 425, 429)


@contextmanager
def answered(session: requests.Session, method: str, url: str, timeout: tuple[float, float],
             **more: object) -> Iterator[requests.Response]:
    """Send a request, and yield the response. The caller reads the body.

    Raises TemporaryFailure or PermanentFailure if the request fails. Raises CutOff if the caller cannot read the body
    to the end.
    """
    try:
        response = session.request(method, url, timeout=timeout, stream=True, **more)
    except requests.exceptions.SSLError as error:
        raise PermanentFailure(f"the secure connection failed: {_original_error(error)}") from error
    except requests.ReadTimeout as error:
        raise TemporaryFailure(f"no response within {timeout[1]:g} s", responded=False) from error
    except requests.ConnectionError as error:
        cause = _original_error(error)
        proxy = " to the proxy" if isinstance(error, requests.exceptions.ProxyError) else ""
        raise (NoSuchHost if isinstance(cause, gaierror) else TemporaryFailure)(
            f"cannot connect{proxy}: {getattr(cause, 'strerror', None) or cause}", responded=False) from error
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidProxyURL) as error:
        # The URL itself may be right: the proxy may need a package, or the URL of the proxy may be wrong.
        needs = " (install PySocks, or set HTTPS_PROXY and ALL_PROXY to an HTTP proxy)" * ("SOCKS" in str(error))
        raise PermanentFailure(f"the URL or its proxy cannot be used: {str(error).rstrip('.')}{needs}",
                               "unreachable" if host_of(url) else "bad address") from error
    except (requests.RequestException, ValueError) as error:  # an invalid URL, or too many redirects
        raise PermanentFailure(str(error), "bad address" if isinstance(error, ValueError) else "unreachable") from error
    with response:
        try:
            yield response
        except urllib3.exceptions.TimeoutError as error:
            raise CutOff(f"no data for {timeout[1]:g} s") from error
        except (urllib3.exceptions.HTTPError, requests.RequestException) as error:
            raise CutOff("connection lost") from error


def _original_error(error: BaseException) -> BaseException:
    """Return the first error in a chain of errors. The later errors only repeat the URL."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


class RateLimit:
    """A limit for all threads together: `per_second` requests per second, at equal intervals."""

    def __init__(self, per_second: float):
        self.distance, self.next, self.lock = 1 / per_second, 0.0, threading.Lock()

    def wait(self) -> None:
        """Sleep until the caller may send a request."""
        with self.lock:
            turn = max(time.monotonic(), self.next)
            self.next = turn + self.distance
        time.sleep(max(0.0, turn - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Block all requests for this number of seconds."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class Answer(NamedTuple):
    """The result of downloading a small file: its body, or the reason why there is none."""

    status: str  # fetched, unreachable, too large, bad address
    detail: str = ""
    body: bytes = b""


def host_of(address: str) -> str | None:
    """Return the host and port of an http or https URL, or None if the URL is invalid."""
    with suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname:
            return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    return None


def ask(session: requests.Session, url: str) -> Answer | str:
    """Request a small file once. Return the answer, or the URL to which the server redirects.

    Raises TemporaryFailure if another attempt may succeed. A permanent failure is returned as an answer.
    """
    try:
        with answered(session, "GET", url, TIMEOUT, allow_redirects=False) as response:
            if response.is_redirect:
                return urljoin(url, response.headers["Location"])
            if (code := response.status_code) != 200:
                message = f"HTTP {code}"
                raise TemporaryFailure(message, response) if is_retryable(code) else PermanentFailure(message)
            if (length := response.raw.length_remaining or 0) > MAX_BYTES:
                raise PermanentFailure(f"{length} bytes", "too large")
            body, deadline = bytearray(), time.monotonic() + MAX_SECONDS
            # `read1` returns the data that has arrived. `read` would wait for a full chunk, even if it takes very long.
            while chunk := response.raw.read1(CHUNK, decode_content=True):
                body += chunk
                if len(body) > MAX_BYTES:
                    raise PermanentFailure(f"more than {MAX_BYTES} bytes", "too large")
                if time.monotonic() > deadline:
                    raise PermanentFailure(f"not finished after {MAX_SECONDS} s")
            return Answer("fetched", body=bytes(body))
    except PermanentFailure as refused:
        return Answer(refused.status, str(refused)[:200])
    except ValueError as error:  # raised by urljoin
        return Answer("bad address", str(error)[:200])


class Host:
    """The state of one host, shared by all threads that send requests to it.

    After HTTP 429 or 503 (`overloaded`), the host gets only one request at a time.
    """

    def __init__(self):
        self.room, self.alone, self.overloaded = threading.Semaphore(PER_HOST), threading.Lock(), False
        self.not_before = 0.0
        self.silent = 0   # number of attempts in a row without any response
        self.closed = ""  # the reason why the host gets no more requests; "" if it still gets them

    def learn(self, name: str, failure: TemporaryFailure, retry_policy: RetryPolicy) -> None:
        """Update the state after a failed request. If necessary, pause or end the requests to this host."""
        self.silent = 0 if failure.responded else self.silent + 1
        if failure.overloaded:
            self.overloaded = True
            pause = min(failure.wait or retry_policy.first, retry_policy.longest)
            self.not_before = max(self.not_before, time.monotonic() + pause)
        if failure.wait > retry_policy.longest:
            self.closed, self.not_before = f"{name} asks for a pause of {failure.wait:.0f} s ({failure})", 0.0
        elif self.silent >= SILENT_ATTEMPTS:
            self.closed = f"{name} does not respond ({failure})"


class Fetcher:
    """A downloader of small files from many servers; `results()` yields the answers as they arrive.

    Temporary failures are retried. At most PER_HOST requests per host and AT_ONCE requests in total run at the same
    time. At most `rate` requests per second are sent.
    """

    retry_policy = RetryPolicy(attempts=4, first=1.0, longest=120.0)

    def __init__(self, addresses: list[str], rate: float):
        by_host: dict[str | None, list[str]] = defaultdict(list)
        for address in addresses:
            by_host[host_of(address)].append(address)
        # Alternate between the hosts, so that a slow host delays the others as little as possible.
        turns = itertools.zip_longest(*by_host.values())
        self.addresses = [address for turn in turns for address in turn if address is not None]
        self.hosts: dict[str, Host] = defaultdict(Host)
        self.limit, self.session, self.stop = RateLimit(rate), requests.Session(), threading.Event()
        self.under_way = threading.Semaphore(AT_ONCE)
        self.uncollected = threading.Semaphore(AT_ONCE)  # limits the number of bodies in memory that wait to be yielded

    def results(self) -> Iterator[tuple[str, Answer]]:
        """Yield (address, answer) pairs as the answers arrive.

        If the iterator is closed early, no more requests are sent.
        """
        self.session.headers.update(HEADERS)
        with self.session, ThreadPool(THREADS) as pool:  # daemon threads: an interrupted command ends immediately
            try:
                for address, answer in pool.imap_unordered(self._fetch, self.addresses):
                    if answer.body:
                        self.uncollected.release()
                    yield address, answer
            finally:
                self.stop.set()
                self.uncollected.release(AT_ONCE)  # wake up the threads that wait for this semaphore

    def _fetch(self, address: str) -> tuple[str, Answer]:
        """Download one file, following redirects and retrying temporary failures. Raises Stopped if `stop` is set."""
        url = address
        for _ in range(MAX_REDIRECTS + 1):
            name = host_of(url)
            if name is None:
                return address, Answer("bad address", f"{url[:200]!r} is not an http or https URL")
            try:
                answer = retry(partial(self._ask, name, url), self.retry_policy, self.stop)
            except PermanentFailure as refused:
                return address, Answer("unreachable", str(refused.__cause__ or refused))
            if isinstance(answer, Answer):
                return address, answer
            url = answer
        return address, Answer("unreachable", f"more than {MAX_REDIRECTS} redirects")

    def _ask(self, name: str, url: str) -> Answer | str:
        """Make one request as soon as the limits allow it. Return the answer, or the URL of a redirect.

        Raises TemporaryFailure if another attempt may succeed. Raises PermanentFailure if the host gets no more
        requests. Raises Stopped if `stop` is set.
        """
        host = self.hosts[name]
        with host.room, host.alone if host.overloaded else nullcontext():
            if self.stop.wait(max(0.0, host.not_before - time.monotonic())):
                raise Stopped
            with self.under_way:
                if not host.closed:
                    self.limit.wait()
                if host.closed:
                    raise PermanentFailure(host.closed)
                try:
                    answer = ask(self.session, url)
                except TemporaryFailure as failure:
                    host.learn(name, failure, self.retry_policy)
                    raise (PermanentFailure(host.closed) if host.closed else failure) from None
                host.silent = 0
                if isinstance(answer, Answer) and answer.body:
                    self.uncollected.acquire()
                return answer
