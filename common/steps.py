"""Commands that run one after another, each a process of its own."""

import logging
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from common.cli import ROOT
from common.errors import Interrupted, stop_request

log = logging.getLogger(__name__)


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
    """Wait for a step; hand a stop request on to it, so that it can save; leave with its exit code if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}
    with stop_request, subprocess.Popen(command, env=environment) as child:
        handed_on = False
        while child.poll() is None:
            try:
                child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop_request.requested and not handed_on:
                    handed_on = True
                    if stop_request.signal_number != signal.SIGINT:  # the terminal sends that one to both
                        child.send_signal(stop_request.signal_number)
    if stop_request.requested:
        raise Interrupted()
    if child.returncode:
        sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)
