"""HTTP as every step uses it: what a fault means, when to ask again, and many small files from many servers."""

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
TIMEOUT = (10.0, 15.0)  # seconds to connect, and between two packets, of a small file
MAX_BYTES = 20_000_000
MAX_SECONDS = 60        # for the body of one answer, however steadily it drips
CHUNK = 1 << 16
THREADS = 32            # of which most wait: for their turn, or before another attempt
AT_ONCE = 8             # requests
PER_HOST = 4            # connections to one host at once
SILENT_ATTEMPTS = 20    # in a row; a host that answers none of them is left alone
MAX_REDIRECTS = 5


class PermanentFailure(Exception):
    """An address will not serve what is asked for; to ask it again would be useless."""

    def __init__(self, what: str, status: str = "unreachable"):
        super().__init__(what)
        self.status = status  # of an Answer


class TemporaryFailure(Exception):
    """A fault that may pass. `wait`: for how many seconds the server asks to be left alone, 0 if it does not say."""

    def __init__(self, what: str, response: requests.Response | None = None, heard: bool = True):
        super().__init__(what)
        self.wait, self.overloaded = 0.0, False
        self.heard = heard  # whether the host said anything at all
        if response is not None:
            self.overloaded = response.status_code in (429, 503)  # the host means all addresses
            with suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
                self.wait = float(urllib3.Retry().get_retry_after(response.raw) or 0)


class NoSuchHost(TemporaryFailure):
    """A name that could not be looked up, which passes only if it has been found before."""


class CutOff(TemporaryFailure):
    """The connection ended, or fell silent, in the middle of an answer."""


class Stopped(Exception):
    """The run is to end; what has come so far is kept."""


class RetryPolicy(NamedTuple):
    """How often something is tried, and with which pauses."""

    attempts: int
    first: float    # seconds before the second attempt; before each later one twice as long
    longest: float  # a server that asks for more is left alone


def retry(attempt: Callable[[], Result], retry_policy: RetryPolicy, stop: threading.Event,
            tell: Callable[[TemporaryFailure, float], bool] = lambda failed, pause: False) -> Result:
    """What `attempt` gives once it succeeds. Raises Refused when patience is lost, and Stopped once `stop` is set.

    `tell` gets every fault with the pause that follows, and returns whether the count of attempts begins anew.
    """
    number = 1
    while True:
        try:
            return attempt()
        except TemporaryFailure as failed:
            if failed.wait > retry_policy.longest:
                raise PermanentFailure(f"{failed}, and asks to wait for {failed.wait:.0f} s") from failed
            if number >= retry_policy.attempts:
                raise PermanentFailure(f"{failed} ({number} attempts)") from failed
            pause = failed.wait or min(retry_policy.first * 2 ** (number - 1), retry_policy.longest)
            number = 1 if tell(failed, pause) else number + 1
        if stop.wait(pause):
            raise Stopped


def is_retryable(status: int) -> bool:
    """Whether another attempt may get a better answer."""
    return status >= 500 or status in (408, 409, 425, 429)


@contextmanager
def answered(session: requests.Session, method: str, url: str, timeout: tuple[float, float],
             **more: object) -> Iterator[requests.Response]:
    """The answer, of which only the headers have been read; faults, also while it is read, become Failed or Refused."""
    try:
        response = session.request(method, url, timeout=timeout, stream=True, **more)
    except requests.exceptions.SSLError as error:
        raise PermanentFailure(f"no secure connection: {_innermost(error)}") from error
    except requests.ReadTimeout as error:
        raise TemporaryFailure(f"no answer within {timeout[1]:g} s", heard=False) from error
    except requests.ConnectionError as error:
        cause = _innermost(error)
        proxy = " to the proxy" if isinstance(error, requests.exceptions.ProxyError) else ""
        raise (NoSuchHost if isinstance(cause, gaierror) else TemporaryFailure)(
            f"cannot connect{proxy}: {getattr(cause, 'strerror', None) or cause}", heard=False) from error
    except (requests.RequestException, ValueError) as error:  # an address that is none, too many redirects
        raise PermanentFailure(str(error), "bad address" if isinstance(error, ValueError) else "unreachable") from error
    with response:
        try:
            yield response
        except urllib3.exceptions.TimeoutError as error:
            raise CutOff(f"silent for {timeout[1]:g} s, cut off") from error
        except (urllib3.exceptions.HTTPError, requests.RequestException) as error:
            raise CutOff("cut off") from error


def _innermost(error: BaseException) -> BaseException:
    """What the system said; the errors around it only repeat the address."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


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


class Answer(NamedTuple):
    """The result for the address of a small file: its body, or why there is none."""

    status: str  # fetched, unreachable, too large, bad address
    detail: str = ""
    body: bytes = b""


def host_of(address: str) -> str | None:
    """Host and port of an http or https address; None if it is none."""
    with suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname:
            return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    return None


def ask(session: requests.Session, url: str) -> Answer | str:
    """The answer to one request for a small file, or the address that it is redirected to. Raises Failed."""
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
            # read1 gives what has come; read would wait for a full chunk, however slowly it drips.
            while chunk := response.raw.read1(CHUNK, decode_content=True):
                body += chunk
                if len(body) > MAX_BYTES:
                    raise PermanentFailure(f"more than {MAX_BYTES} bytes", "too large")
                if time.monotonic() > deadline:
                    raise PermanentFailure(f"not done after {MAX_SECONDS} s")
            return Answer("fetched", body=bytes(body))
    except PermanentFailure as refused:
        return Answer(refused.status, str(refused)[:200])
    except ValueError as error:  # of urljoin
        return Answer("bad address", str(error)[:200])


class Host:
    """The state of one host, shared by the threads that ask it."""

    def __init__(self):
        self.room, self.alone, self.overloaded = threading.Semaphore(PER_HOST), threading.Lock(), False
        self.not_before = 0.0
        self.silent = 0   # attempts in a row without any answer
        self.closed = ""  # why it is not asked any more

    def learn(self, name: str, failed: TemporaryFailure, retry_policy: RetryPolicy) -> None:
        """Pause, or close, the host if its fault says so."""
        self.silent = 0 if failed.heard else self.silent + 1
        if failed.overloaded:
            self.overloaded = True
            pause = min(failed.wait or retry_policy.first, retry_policy.longest)
            self.not_before = max(self.not_before, time.monotonic() + pause)
        if failed.wait > retry_policy.longest:
            self.closed, self.not_before = f"{name} asks for a pause of {failed.wait:.0f} s ({failed})", 0.0
        elif self.silent >= SILENT_ATTEMPTS:
            self.closed = f"{name} does not answer ({failed})"


class Fetcher:
    """Asks every address, again where that may help; `results()` gives the answers as they come.

    No host has more than PER_HOST connections, no more than AT_ONCE requests are under way, and no more than `rate` a
    second are made in all. The pool's threads are daemons, so that an interrupted command ends at once.
    """

    retry_policy = RetryPolicy(attempts=4, first=1.0, longest=120.0)

    def __init__(self, addresses: list[str], rate: float):
        by_host: dict[str | None, list[str]] = defaultdict(list)
        for address in addresses:
            by_host[host_of(address)].append(address)
        # In turns, so that a host that is slow holds up few others.
        turns = itertools.zip_longest(*by_host.values())
        self.addresses = [address for turn in turns for address in turn if address is not None]
        self.hosts: dict[str, Host] = defaultdict(Host)
        self.limit, self.session, self.stop = RateLimit(rate), requests.Session(), threading.Event()
        self.under_way = threading.Semaphore(AT_ONCE)
        self.uncollected = threading.Semaphore(AT_ONCE)  # bodies, which are held in memory

    def results(self) -> Iterator[tuple[str, Answer]]:
        """(address, answer) pairs. Closing this iterator early ends the asking."""
        self.session.headers.update(HEADERS)
        with self.session, ThreadPool(THREADS) as pool:
            try:
                for address, answer in pool.imap_unordered(self._fetch, self.addresses):
                    if answer.body:
                        self.uncollected.release()
                    yield address, answer
            finally:
                self.stop.set()
                self.uncollected.release(AT_ONCE)  # threads may wait for it

    def _fetch(self, address: str) -> tuple[str, Answer]:
        """Ask for one address until there is an answer, also where it was redirected to. Raises Stopped."""
        url = address
        for _ in range(MAX_REDIRECTS + 1):
            name = host_of(url)
            if name is None:
                return address, Answer("bad address", f"{url[:200]!r} is no http or https address")
            try:
                answer = retry(partial(self._ask, name, url), self.retry_policy, self.stop)
            except PermanentFailure as refused:
                return address, Answer("unreachable", str(refused.__cause__ or refused))
            if isinstance(answer, Answer):
                return address, answer
            url = answer
        return address, Answer("unreachable", f"more than {MAX_REDIRECTS} redirects")

    def _ask(self, name: str, url: str) -> Answer | str:
        """One request, in its turn. Raises Failed, Refused if the host is not asked any more, or Stopped."""
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
                except TemporaryFailure as failed:
                    host.learn(name, failed, self.retry_policy)
                    raise (PermanentFailure(host.closed) if host.closed else failed) from None
                host.silent = 0
                if isinstance(answer, Answer) and answer.body:
                    self.uncollected.acquire()
                return answer
