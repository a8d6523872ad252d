"""Runs a sequence of commands, each in its own process."""

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
    """Return the command that runs a Python module of this project."""
    # -P keeps the current folder off the import path, because it may be another checkout.
    return [sys.executable, "-P", "-m", name, *flags]


def script(path: str, *flags: str) -> list[str]:
    """Return the command that runs a Python file of this project; `path` is relative to the root."""
    return [sys.executable, str(ROOT / path), *flags]


def run_steps(steps: list[Step]) -> None:
    """Run the steps in order, and log the time of each step. If a step fails, exit with its exit code."""
    start = time.monotonic()
    for number, step in enumerate(steps, start=1):
        log.info("[%d/%d] %s", number, len(steps), step.title)
        step_start = time.monotonic()
        _run(step.command)
        log.info("[%d/%d] took %.0f s\n", number, len(steps), time.monotonic() - step_start)
    log.info("all steps done in %.0f s", time.monotonic() - start)


def _run(command: list[str]) -> None:
    """Run a step in a new process, and wait until it ends. If the step fails, exit with its exit code.

    Signals are forwarded to the step. If this process ends, even by SIGKILL, the step ends as well.
    """
    # The step has its own process group, so that it gets each signal only once, even a signal from the keyboard.
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
    """Yield a queue that collects the signals that arrive inside the `with` block.

    Signals that are still in the queue at the end of the block take effect after the block.
    """
    signals: deque[int] = deque()
    previous = {number: signal.getsignal(number) for number in (*FORWARDED, signal.SIGTTOU)}
    for number in FORWARDED:
        if previous[number] != signal.SIG_IGN:  # under nohup, SIGHUP is ignored; do not change that
            signal.signal(number, lambda number, frame: signals.append(number))
    # Ignore SIGTTOU; the steps inherit this. Otherwise, a terminal with `stty tostop` would suspend a step that prints.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    while signals:
        signal.raise_signal(signals.popleft())


def _forward(number: int, child: subprocess.Popen) -> None:
    """Send a signal to a step. For SIGTSTP (Ctrl-Z), suspend the step and this process until both are continued."""
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
