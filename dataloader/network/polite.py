"""Fetching many small files from other people's servers: few at once, not too fast, and without insisting."""

import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import requests

from dataloader.network.ask import HEADERS, Answer, Later, Moved, ask, host_of

THREADS = 8
PER_HOST = 4          # connections to one host at once
ATTEMPTS = 4          # per address
FIRST_PAUSE = 1.0     # seconds before the second attempt; before each later one twice as long
LONGEST_PAUSE = 120   # a host that asks for more is left alone until the next run
SILENT_ATTEMPTS = 20  # in a row; a host that answers none of them is left alone, too
MAX_REDIRECTS = 5


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
                    self._settle(job, ask(session, job.url))
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
        """A job that may be asked now, or else when there may be one (never: once something has changed)."""
        if len(self.done) >= THREADS:  # their bodies are held in memory until somebody collects them
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

    def _settle(self, job: Job, answer: Answer | Later | Moved) -> None:
        with self.changed:
            host = self.hosts[host_of(job.url)]
            host.active -= 1
            if isinstance(answer, Later):
                self._try_again(host, job, answer)
            elif isinstance(answer, Moved):
                host.silent = 0
                self._follow(job, answer)
            else:
                host.silent = 0
                self._finish(job, answer)
            self.changed.notify_all()

    def _try_again(self, host: Host, job: Job, answer: Later) -> None:
        job.attempts += 1
        host.silent = 0 if answer.heard else host.silent + 1
        moment = time.monotonic() + (answer.pause or FIRST_PAUSE * 2 ** (job.attempts - 1))
        if answer.overloaded:
            host.room, host.not_before = 1, max(host.not_before, moment)
        if (answer.pause or 0) > LONGEST_PAUSE:
            self._close(host, f"{host_of(job.url)} asks for a pause of {answer.pause:.0f} s ({answer.detail})")
        elif host.silent >= SILENT_ATTEMPTS:
            self._close(host, f"{host_of(job.url)} does not answer ({answer.detail})")
        if job.attempts < ATTEMPTS:
            self._queue(job, moment)
        else:
            self._finish(job, Answer("unreachable", answer.detail))

    def _follow(self, job: Job, answer: Moved) -> None:
        job.url, job.redirects = answer.address, job.redirects + 1
        if job.redirects > MAX_REDIRECTS:
            self._finish(job, Answer("unreachable", f"more than {MAX_REDIRECTS} redirects"))
        else:
            self._queue(job, 0.0)

    def _close(self, host: Host, why: str) -> None:
        host.closed = why
        for _, _, job in host.waiting:
            self._finish(job, Answer("unreachable", why))
        if host.waiting:
            self.turns.remove(host)
            host.waiting.clear()
