"""Run code in a separate Python process, because the code may end the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def python():
    """A function that runs `python -c code *arguments` and returns the finished process.

    The code can import the project. The output is text.
    """
    def run(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True, check=False, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)
    return run


@pytest.fixture
def command(python):
    """A function that runs `body` as the `main(argv)` of a command, with `run_command`."""
    def run(body: str, *arguments: object, **options) -> subprocess.CompletedProcess:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        return python("import logging, os, signal, sys, time\n"
                      "from pathlib import Path\n"
                      "from common.errors import *\n"
                      "from common.command import run_command, stop_request\n"
                      f"def main(argv):\n{lines}"
                      "sys.exit(run_command(main))\n", *arguments, **options)
    return run
