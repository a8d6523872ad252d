"""Run a sequence of commands, each in its own process."""

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
from common.errors import Interrupted, ResourceError, UserError

log = logging.getLogger(__name__)

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


OUT_OF_MEMORY = 127  # exit code of a process whose C library has no memory for a thread
# For each signal that can end a step: the usual reason, and the fix
STOPPED = "Another program, or the end of the session, has stopped it"
CRASHED = "Usually, a library has crashed"
AGAIN = "run the same command again without --force to continue the work"
REPAIR = f"{AGAIN}; if the step crashes again, install the packages of requirements.txt again"
MEANINGS: dict[int, tuple[str, str]] = {
    signal.SIGKILL: ("Usually, the memory was full and the system has stopped the largest process", "close other "
                     "programs, use a smaller batch_size, or give the machine or the container more memory, and run "
                     "the same command again"),
    signal.SIGABRT: ("Usually, a library has stopped it, for example because the memory was full", REPAIR),
    signal.SIGSEGV: (CRASHED, REPAIR),
    signal.SIGFPE: (CRASHED, REPAIR),
    signal.SIGBUS: ("Usually, the disk or the shared memory (/dev/shm) is full, or a file became shorter while it was "
                    "read", f"free some space, and {AGAIN}"),
    signal.SIGILL: ("Usually, a package was built for another processor", "install packages for this processor"),
    signal.SIGXCPU: ("It has reached its limit of CPU time", "raise the limit (ulimit -t)"),
    **dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT), (STOPPED, AGAIN))}


class Step(NamedTuple):
    title: str
    command: list[str]


class StepKilled(UserError):
    """A signal has ended a step. The exit code is 128 + the number of the signal, as in a shell."""

    def __init__(self, where: str, title: str, number: int):
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        super().__init__(where, f"{title!r} was ended by {name}", *MEANINGS.get(number, ("", AGAIN)))
        self.exit_code = 128 + number


def module(name: str, *flags: str) -> list[str]:
    """Return the command that runs a Python module of this project."""
    # -P keeps the current folder off the import path, because it may be another checkout.
    return [sys.executable, "-P", "-m", name, *flags]


def script(path: str, *flags: str) -> list[str]:
    """Return the command that runs a Python file of this project; `path` is relative to the root."""
    return [sys.executable, str(ROOT / path), *flags]


def run_steps(steps: list[Step]) -> None:
    """Run the steps in order, and log the time of each step.

    If a step fails, exit with its exit code. Raises StepKilled if a signal ends a step.
    """
    start = time.monotonic()
    for number, step in enumerate(steps, start=1):
        log.info("[%d/%d] %s", number, len(steps), step.title)
        step_start = time.monotonic()
        code = _run(step.command)
        if code < 0:
            raise StepKilled(f"step {number}/{len(steps)}", step.title, -code)
        if code == OUT_OF_MEMORY:
            raise ResourceError(f"step {number}/{len(steps)}", f"the C library has ended {step.title!r}",
                                *MEANINGS[signal.SIGKILL])
        if code:
            sys.exit(code)  # the step has printed its error
        log.info("[%d/%d] took %.0f s\n", number, len(steps), time.monotonic() - step_start)
    log.info("all steps done in %.0f s", time.monotonic() - start)


def _run(command: list[str]) -> int:
    """Run a step in a new process, and wait until it ends. Return its exit code, as in `subprocess`.

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
    return child.returncode


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
