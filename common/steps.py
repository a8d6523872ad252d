"""Commands that run one after another, each a process of its own."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from common.cli import ROOT
from common.command import WATCHED, stop_request
from common.errors import Interrupted

log = logging.getLogger(__name__)

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


class Step(NamedTuple):
    title: str
    command: list[str]


def module(name: str, *flags: str) -> list[str]:
    # -P keeps the caller's folder, which may be another checkout, off the import path.
    return [sys.executable, "-P", "-m", name, *flags]


def script(path: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / path), *flags]


def run_steps(steps: list[Step]) -> None:
    """Run them in order and say how long each took; leave with the exit code of the first that fails."""
    started = time.monotonic()
    for number, step in enumerate(steps, start=1):
        log.info("[%d/%d] %s", number, len(steps), step.title)
        begun = time.monotonic()
        _run(step.command)
        log.info("[%d/%d] took %.0f s\n", number, len(steps), time.monotonic() - begun)
    log.info("all done in %.0f s", time.monotonic() - started)


def _run(command: list[str]) -> None:
    """Wait for a step, and leave with its exit code if it fails.

    A step has its own process group and receives each signal once, from here: no matter whether the signal was sent
    to this process alone, to its group, or by a key of the terminal. It ends with this process, even a killed one.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}
    watched, held = os.pipe()
    with _collected_signals() as signals, os.fdopen(held, "w"):
        child = subprocess.Popen(command, env={**environment, WATCHED: str(watched)}, pass_fds=[watched],
                                 stdin=subprocess.DEVNULL, process_group=0)
        os.close(watched)
        while child.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.2)
            while signals:
                _forward(signals.popleft(), child)
    if stop_request.requested:
        raise Interrupted()
    if child.returncode:
        sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)


@contextmanager
def _collected_signals() -> Iterator[deque[int]]:
    """The signals that arrive inside, which have no effect there; those still in it at the end have theirs then."""
    signals: deque[int] = deque()
    before = {number: signal.getsignal(number) for number in (*FORWARDED, signal.SIGTTOU)}
    for number in FORWARDED:
        if before[number] != signal.SIG_IGN:  # as by nohup
            signal.signal(number, lambda number, frame: signals.append(number))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the steps inherit this: `stty tostop` would stop their output
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    while signals:
        signal.raise_signal(signals.popleft())


def _forward(number: int, child: subprocess.Popen) -> None:
    if number != signal.SIGTSTP:
        if number in (signal.SIGINT, signal.SIGTERM):
            stop_request.signal_number = number
        child.send_signal(number)
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGSTOP)
        collect = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # returns after the shell's `fg` or `bg`
        signal.signal(signal.SIGTSTP, collect)
        os.killpg(child.pid, signal.SIGCONT)
