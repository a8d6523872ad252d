"""HTTP as every step uses it: what a fault means, when to ask again, and many small files from many servers."""

import itertools
import queue
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from email.utils import parsedate_to_datetime
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


class Refused(Exception):
    """An address will not serve what is asked for; to ask it again would be useless."""


class Failed(Exception):
    """A fault that may pass. `wait`: for how many seconds the server asks to be left alone, 0 if it does not say."""

    def __init__(self, what: str, response: requests.Response | None = None, heard: bool = True):
        super().__init__(what)
        self.wait = 0.0 if response is None else retry_after(response.headers.get("Retry-After", ""))
        self.overloaded = response is not None and response.status_code in (429, 503)  # the host means all addresses
        self.heard = heard  # whether the host said anything at all


class NoSuchHost(Failed):
    """A name that could not be looked up, which passes only if it has been found before."""


class CutOff(Failed):
    """The connection ended, or fell silent, in the middle of an answer."""


class Stopped(Exception):
    """The run is to end; what has come so far is kept."""


class Patience(NamedTuple):
    """How often something is tried, and with which pauses."""

    attempts: int
    first: float    # seconds before the second attempt; before each later one twice as long
    longest: float  # a server that asks for more is left alone

    def pause(self, failed: Failed, attempt: int) -> float:
        """Seconds until the attempt after this one. Raises Refused where none is due."""
        if failed.wait > self.longest:
            raise Refused(f"{failed}, and asks to wait for {failed.wait:.0f} s") from failed
        if attempt >= self.attempts:
            raise Refused(f"{failed} ({attempt} attempts)") from failed
        return failed.wait or min(self.first * 2 ** (attempt - 1), self.longest)


def persist(attempt: Callable[[], Result], patience: Patience, stop: threading.Event,
            tell: Callable[[Failed, float], bool]) -> Result:
    """What `attempt` gives once it succeeds. Raises Refused when patience is lost, and Stopped once `stop` is set."""
    number = 1  # `tell` gets every fault with the pause that follows, and says whether the count begins anew
    while True:
        try:
            return attempt()
        except Failed as failed:
            pause = patience.pause(failed, number)
            number = 1 if tell(failed, pause) else number + 1
        if stop.wait(pause):
            raise Stopped


def may_pass(status: int) -> bool:
    """Whether another time the answer may be better."""
    return status >= 500 or status in (408, 409, 425, 429)


def retry_after(text: str) -> float:
    """Seconds, from a number of them or from a date; 0 if it is neither."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


@contextmanager
def answered(session: requests.Session, method: str, url: str, timeout: tuple[float, float],
             **more: object) -> Iterator[requests.Response]:
    """The answer, of which only the headers have been read; faults, also while it is read, become Failed or Refused."""
    try:
        response = session.request(method, url, timeout=timeout, stream=True, **more)
    except requests.exceptions.SSLError as error:
        raise Refused(f"no secure connection: {_innermost(error)}") from error
    except requests.ConnectTimeout as error:
        raise Failed(f"cannot connect: no answer within {timeout[0]:g} s", heard=False) from error
    except requests.ReadTimeout as error:
        raise Failed(f"no answer within {timeout[1]:g} s", heard=False) from error
    except requests.ConnectionError as error:
        cause = _innermost(error)
        proxy = " to the proxy" if isinstance(error, requests.exceptions.ProxyError) else ""
        raise (NoSuchHost if isinstance(cause, gaierror) else Failed)(
            f"cannot connect{proxy}: {getattr(cause, 'strerror', None) or cause}", heard=False) from error
    except (requests.RequestException, ValueError) as error:  # an address that is none, too many redirects
        raise Refused(str(error)) from error
    with response:
        try:
            yield response
        except urllib3.exceptions.TimeoutError as error:
            raise CutOff(f"silent for {timeout[1]:g} s") from error
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
    """What came of the address of a small file: `fetched` with its body, or why there is none."""

    status: str  # fetched, unreachable, too large, bad address
    detail: str = ""
    body: bytes = b""


def host_of(address: str) -> str | None:
    """Host and port of an http or https address; None if it is none."""
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        return None


def ask(session: requests.Session, url: str) -> Answer | str:
    """One request for a small file: what came of it, or where it was redirected to, which needs a turn of its own.

    Raises Failed.
    """
    try:
        with answered(session, "GET", url, TIMEOUT, allow_redirects=False) as response:
            if response.is_redirect:
                try:
                    return urljoin(url, response.headers["Location"])
                except ValueError as error:
                    return Answer("bad address", str(error)[:200])
            if may_pass(code := response.status_code):
                raise Failed(f"HTTP {code}", response)
            return read_small(response) if code == 200 else Answer("unreachable", f"HTTP {code}")
    except Refused as refused:
        bad = isinstance(refused.__cause__, ValueError)
        return Answer("bad address" if bad else "unreachable", str(refused)[:200])


def read_small(response: requests.Response) -> Answer:
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > MAX_BYTES:
        return Answer("too large", f"{int(length)} bytes")
    body, deadline = bytearray(), time.monotonic() + MAX_SECONDS
    # read1 gives what has come; read would wait for a full chunk, however slowly it drips.
    while chunk := response.raw.read1(CHUNK, decode_content=True):
        body += chunk
        if len(body) > MAX_BYTES:
            return Answer("too large", f"more than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            return Answer("unreachable", f"not done after {MAX_SECONDS} s")
    return Answer("fetched", body=bytes(body))


class Host:
    """What is known of a host, and how many connections it has room for."""

    def __init__(self):
        self.room, self.alone, self.overloaded = threading.Semaphore(PER_HOST), threading.Lock(), False
        self.not_before = 0.0
        self.silent = 0   # attempts in a row without any answer
        self.closed = ""  # why it is not asked any more


class Fetcher:
    """Asks every address, again where that may help; `results()` gives what came of them, as it comes.

    No host has more than PER_HOST connections, no more than AT_ONCE requests are under way, and no more than `rate` a
    second are made in all. Threads do the asking. They are daemons, so that an interrupted command ends at once,
    whatever they are waiting for.
    """

    patience = Patience(attempts=4, first=1.0, longest=120.0)

    def __init__(self, addresses: list[str], rate: float):
        by_host: dict[str | None, list[str]] = {}
        for address in addresses:
            by_host.setdefault(host_of(address), []).append(address)
        # In turns, so that a host that is slow holds up few others.
        turns = itertools.zip_longest(*by_host.values())
        self.waiting = deque(address for turn in turns for address in turn if address is not None)
        self.hosts: dict[str, Host] = defaultdict(Host)
        self.limit, self.left = RateLimit(rate), len(addresses)
        self.under_way, self.stop = threading.Semaphore(AT_ONCE), threading.Event()
        self.done: queue.Queue[tuple[str, Answer | Exception]] = queue.Queue(AT_ONCE)  # bodies are held in memory

    def results(self) -> Iterator[tuple[str, Answer]]:
        """(address, answer) pairs. Closing this iterator early ends the asking."""
        for _ in range(min(THREADS, self.left)):
            threading.Thread(target=self._work, daemon=True).start()
        try:
            while self.left:
                address, answer = self.done.get()
                if isinstance(answer, Exception):
                    raise RuntimeError(f"a thread ended with {self.left} addresses left") from answer
                self.left -= 1
                yield address, answer
        finally:
            self.stop.set()
            with suppress(queue.Empty):  # threads may wait for room
                while True:
                    self.done.get_nowait()

    def _work(self) -> None:
        try:
            with requests.Session() as session, suppress(IndexError):
                session.headers.update(HEADERS)
                while not self.stop.is_set():
                    self._fetch(session, self.waiting.popleft())
        except Exception as error:
            self.done.put(("", error))
            raise

    def _fetch(self, session: requests.Session, address: str) -> None:
        """Ask for one address until there is an answer, also where it was redirected to."""
        url, attempts, redirects = address, 0, 0
        while True:
            name = host_of(url)
            if name is None:
                self.done.put((address, Answer("bad address", f"{url[:200]!r} is no http or https address")))
                return
            host, pause = self.hosts[name], 0.0
            with host.room, host.alone if host.overloaded else nullcontext():
                if self.stop.wait(max(0.0, host.not_before - time.monotonic())):
                    return
                with self.under_way:
                    answer = self._ask(session, host, name, url)
                    if isinstance(answer, Answer):
                        self.done.put((address, answer))
                        return
            if isinstance(answer, str):
                url, redirects = answer, redirects + 1
                if redirects > MAX_REDIRECTS:
                    self.done.put((address, Answer("unreachable", f"more than {MAX_REDIRECTS} redirects")))
                    return
            else:
                attempts += 1
                pause = answer.wait or self.patience.first * 2 ** (attempts - 1)
                if attempts >= self.patience.attempts and not host.closed:
                    self.done.put((address, Answer("unreachable", str(answer))))
                    return
            if not host.closed and self.stop.wait(pause):
                return

    def _ask(self, session: requests.Session, host: Host, name: str, url: str) -> Answer | str | Failed:
        """What comes of one request, if the host is to be asked at all; and what that says of the host."""
        if not host.closed:
            self.limit.wait()
        if host.closed:
            return Answer("unreachable", host.closed)
        try:
            answer = ask(session, url)
            host.silent = 0
            return answer
        except Failed as failed:
            host.silent = 0 if failed.heard else host.silent + 1
            if failed.overloaded:
                host.overloaded = True
                pause = failed.wait or self.patience.first
                host.not_before = max(host.not_before, time.monotonic() + min(pause, self.patience.longest))
            if failed.wait > self.patience.longest:
                host.closed, host.not_before = f"{name} asks for a pause of {failed.wait:.0f} s ({failed})", 0.0
            elif host.silent >= SILENT_ATTEMPTS:
                host.closed = f"{name} does not answer ({failed})"
            return failed
