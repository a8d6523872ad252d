"""Processing that is killed or stopped in a query, finds a locked folder, or runs out of memory.

tests/faults kills it while it publishes, and fills its disk.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import LockedError, ResourceError
from common.lock import FolderLock
from dataloader.process import process
from tests.dataloader.helpers import contents, write_baby
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND, run
from tests.errors import Outcome, refused

ROOT = Path(__file__).resolve().parents[2]
EVENTS = [(f"user {n % 30}", f"item {n * 7 % 20}", 10**9 + n // 9) for n in range(600)]

# Kills itself while the database works.
KILLED = """
import os, signal, sys
from common.command import run_command
from dataloader import process
from dataloader import workspace

def run(self, query, *parameters, real=workspace.Workspace.run):
    if query.startswith("CREATE TABLE sorted"):
        (self.folder / "spilled").write_bytes(b"rows")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, query, *parameters)

workspace.Workspace.run = run
sys.exit(run_command(process.main, sys.argv[1:]))
"""

# Receives SIGTERM or SIGINT during a query of many hours.
STOPPED = """
import os, signal, sys, threading
from common.command import run_command
from dataloader import process
from dataloader import workspace

def run(self, query, *parameters, real=workspace.Workspace.run):
    if query.startswith("CREATE TABLE sorted"):
        threading.Timer(0.2, os.kill, (os.getpid(), int(sys.argv[1]))).start()
        query, parameters = "SELECT sum(hash(i * 7)) FROM range(1000000000000) r(i)", ()
    return real(self, query, *parameters)

workspace.Workspace.run = run
sys.exit(run_command(process.main, sys.argv[2:]))
"""

def python(code: str, tmp_path: Path, *arguments: object) -> Outcome:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments), *flags(tmp_path)], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
                          check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def flags(tmp_path: Path) -> list[str]:
    return ["--data_root", str(tmp_path / "data"), "--raw_dir", str(tmp_path / "raw")]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


@pytest.mark.slow
def test_a_run_killed_in_a_query_can_be_repeated(tmp_path):
    undisturbed = contents(run(tmp_path / "undisturbed", EVENTS, minimum=5).folder)
    write_baby(tmp_path / "raw", EVENTS)
    folder = tmp_path / "data" / "Baby"
    assert python(KILLED, tmp_path).code == -signal.SIGKILL
    assert left(folder) == {".work"}
    options = make_options(tmp_path / "data", *flags(tmp_path))
    process(options, COMMAND)
    assert contents(options.folder) == undisturbed
    assert left(folder) == {"source.yaml", "card.md", *undisturbed, *(f"{name}.meta.json" for name in undisturbed)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_query_and_keeps_the_old_tables(tmp_path, number):
    options = run(tmp_path, EVENTS, minimum=5)
    before = contents(options.folder)
    write_baby(tmp_path / "raw", EVENTS[:-1])
    done = python(STOPPED, tmp_path, number)
    assert done.code == 128 + number
    [line] = done.err.splitlines()
    assert line.startswith("error: ")
    assert " Fix: " in line
    assert "--force" not in line  # the same command continues
    assert contents(options.folder) == before
    assert ".work" not in left(options.folder.path)


def test_too_little_memory_is_named_with_the_flag(tmp_path):
    with refused(ResourceError, "memory", names=["10MB"], fix=["--memory_limit"]):
        run(tmp_path, EVENTS, "--memory_limit", "10MB")
    assert left(tmp_path / "data" / "Baby") == set()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    options = run(tmp_path, EVENTS)
    before = contents(options.folder)
    write_baby(tmp_path / "raw", EVENTS[:-1])
    scratch = options.folder.path / ".work"
    scratch.mkdir()  # of the process that holds the folder
    with FolderLock(options.folder.path), refused(LockedError, options.folder.path,
                                                  names=[f"{os.getpid()}", socket.gethostname()]):
        process(make_options(tmp_path / "data", *flags(tmp_path)), COMMAND)
    assert scratch.exists()
    assert contents(options.folder) == before
