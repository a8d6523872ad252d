"""HTTP as every step uses it: what a fault means, when to ask again, and many small files from many servers."""

import heapq
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
THREADS = 8
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
    """What `attempt` gives once it does not fail. Raises Refused when patience is lost, and Stopped once `stop` is set.

    `tell` gets every fault with the pause that follows, and says whether the count of attempts begins anew.
    """
    number = 1
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


class Moved(NamedTuple):
    address: str


def host_of(address: str) -> str | None:
    """Host and port of an http or https address; None if it is none."""
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        return None


def ask(session: requests.Session, url: str) -> Answer | Moved:
    """One request for a small file; a redirect is not followed, since it needs a turn of its own. Raises Failed."""
    try:
        with answered(session, "GET", url, TIMEOUT, allow_redirects=False) as response:
            if response.is_redirect:
                return _moved(url, response.headers["Location"])
            if may_pass(code := response.status_code):
                raise Failed(f"HTTP {code}", response)
            return _body(response) if code == 200 else Answer("unreachable", f"HTTP {code}")
    except Refused as refused:
        bad = isinstance(refused.__cause__, ValueError)
        return Answer("bad address" if bad else "unreachable", str(refused)[:200])


def _moved(url: str, location: str) -> Answer | Moved:
    try:
        return Moved(urljoin(url, location))
    except ValueError as error:
        return Answer("bad address", str(error)[:200])


def _body(response: requests.Response) -> Answer:
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


@dataclass(slots=True)
class Job:
    """An address on its way: where it was redirected to, and how often it was asked."""

    address: str
    url: str
    attempts: int = 0
    redirects: int = 0


@dataclass(eq=False, slots=True)
class Host:
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)  # a heap: (not before, order, job)
    not_before: float = 0.0
    active: int = 0
    room: int = PER_HOST
    silent: int = 0   # attempts in a row without any answer
    closed: str = ""  # why it is not asked any more


class Fetcher:
    """Asks every address, again where that may help; `results()` gives what came of them, as it comes.

    No host has more than PER_HOST connections, and no more than `rate` requests a second are made in all. Threads do
    the asking. They are daemons, so that an interrupted command ends at once, whatever they are waiting for.
    """

    patience = Patience(attempts=4, first=1.0, longest=120.0)

    def __init__(self, addresses: list[str], rate: float):
        self.rate = rate
        self.hosts: dict[str, Host] = {}
        self.turns: deque[Host] = deque()  # the hosts that have addresses waiting
        self.done: deque[tuple[str, Answer]] = deque()
        self.changed = threading.Condition()
        self.unfinished, self.order, self.next_slot, self.broken = len(addresses), 0, 0.0, False
        for address in addresses:
            self._queue(Job(address, address), 0.0)

    def results(self) -> Iterator[tuple[str, Answer]]:
        """(address, answer) pairs. Closing this iterator early ends the asking."""
        for _ in range(min(THREADS, self.unfinished)):
            threading.Thread(target=self._work, daemon=True).start()
        try:
            while (result := self._next_result()) is not None:
                yield result
        finally:
            with self.changed:
                self.unfinished = 0
                self.changed.notify_all()

    def _next_result(self) -> tuple[str, Answer] | None:
        with self.changed:
            while not self.done and self.unfinished > 0 and not self.broken:
                self.changed.wait()
            if self.broken:
                raise RuntimeError(f"a thread ended with {self.unfinished} addresses left")
            self.changed.notify_all()  # the threads may wait for room
            return self.done.popleft() if self.done else None

    def _work(self) -> None:
        try:
            with requests.Session() as session:
                session.headers.update(HEADERS)
                while (job := self._take()) is not None:
                    try:
                        answer: Answer | Moved | Failed = ask(session, job.url)
                    except Failed as failed:
                        answer = failed
                    self._settle(job, answer)
        finally:
            with self.changed:
                self.broken = self.broken or self.unfinished > 0
                self.changed.notify_all()

    def _take(self) -> Job | None:
        """Wait for the next address whose host and whose time have come; None when nothing is left."""
        with self.changed:
            while self.unfinished > 0:
                now = time.monotonic()
                job, moment = self._due(now)
                if job is not None:
                    self.next_slot = now + 1 / self.rate
                    return job
                self.changed.wait(None if math.isinf(moment) else moment - now)
            return None

    def _due(self, now: float) -> tuple[Job | None, float]:
        """A ready job, or None and the time of the next try (inf: wait for a notification)."""
        if len(self.done) >= THREADS:  # their bodies are held in memory until the caller collects them
            return None, math.inf
        if now < self.next_slot:
            return None, self.next_slot
        soonest = math.inf
        for _ in range(len(self.turns)):
            host = self.turns[0]
            self.turns.rotate(-1)
            if host.active >= host.room:
                continue
            moment = max(host.not_before, host.waiting[0][0])
            if moment <= now:
                host.active += 1
                job = heapq.heappop(host.waiting)[2]
                if not host.waiting:
                    self.turns.pop()
                return job, now
            soonest = min(soonest, moment)
        return None, soonest

    def _queue(self, job: Job, moment: float) -> None:
        name = host_of(job.url)
        host = self.hosts.setdefault(name, Host()) if name else None
        if host is None:
            self._finish(job, Answer("bad address", f"{job.url[:200]!r} is no http or https address"))
        elif host.closed:
            self._finish(job, Answer("unreachable", host.closed))
        else:
            if not host.waiting:
                self.turns.append(host)
            self.order += 1
            heapq.heappush(host.waiting, (moment, self.order, job))

    def _finish(self, job: Job, answer: Answer) -> None:
        self.unfinished -= 1
        self.done.append((job.address, answer))

    def _settle(self, job: Job, answer: Answer | Moved | Failed) -> None:
        with self.changed:
            host = self.hosts[host_of(job.url)]
            host.active -= 1
            host.silent = host.silent + 1 if isinstance(answer, Failed) and not answer.heard else 0
            if isinstance(answer, Failed):
                self._try_again(host, job, answer)
            elif isinstance(answer, Moved):
                job.url, job.redirects = answer.address, job.redirects + 1
                if job.redirects > MAX_REDIRECTS:
                    self._finish(job, Answer("unreachable", f"more than {MAX_REDIRECTS} redirects"))
                else:
                    self._queue(job, 0.0)
            else:
                self._finish(job, answer)
            self.changed.notify_all()

    def _try_again(self, host: Host, job: Job, failed: Failed) -> None:
        job.attempts += 1
        if failed.wait > self.patience.longest:
            self._close(host, f"{host_of(job.url)} asks for a pause of {failed.wait:.0f} s ({failed})")
        elif host.silent >= SILENT_ATTEMPTS:
            self._close(host, f"{host_of(job.url)} does not answer ({failed})")
        if job.attempts >= self.patience.attempts:
            self._finish(job, Answer("unreachable", str(failed)))
            return
        moment = time.monotonic() + (failed.wait or self.patience.first * 2 ** (job.attempts - 1))
        if failed.overloaded:
            host.room, host.not_before = 1, max(host.not_before, moment)
        self._queue(job, moment)

    def _close(self, host: Host, why: str) -> None:
        host.closed = why
        for _, _, job in host.waiting:
            self._finish(job, Answer("unreachable", why))
        if host.waiting:
            self.turns.remove(host)
            host.waiting.clear()
