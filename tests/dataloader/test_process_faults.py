"""Processing that is killed, stopped, locked out, or short of memory or of disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.artifacts import load_interactions, load_meta
from common.errors import ArtifactError, DataError, LockedError, ResourceError
from common.lock import FolderLock
from dataloader.process import process
from tests.dataloader.helpers import contents, write_baby
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND, run

ROOT = Path(__file__).resolve().parents[2]
EVENTS = [(f"user {n % 30}", f"item {n * 7 % 20}", n // 9) for n in range(600)]

# Kills itself at the n-th call of `os.replace`, or, with 0, in the middle of the database's work.
KILLED = """
import os, signal, sys
from common.command import run_command
from dataloader import process
from dataloader import workspace
count = int(sys.argv[1])

def replace(source, target, real=os.replace, done=[]):
    done.append(target)
    if len(done) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)

def run(self, query, *parameters, real=workspace.Workspace.run):
    if count == 0 and query.startswith("CREATE TABLE sorted"):
        (self.folder / "spilled").write_bytes(b"rows")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, query, *parameters)

os.replace, workspace.Workspace.run = replace, run
sys.exit(run_command(process.main, sys.argv[2:]))
"""

# Gets a SIGTERM, or a SIGINT, while a query runs that would take hours.
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

# May write so many bytes to a file and no more.
LIMITED = """
import resource, sys
from common.command import run_command
from dataloader import process
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.exit(run_command(process.main, sys.argv[2:]))
"""


def python(code: str, tmp_path: Path, argument: int) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, str(argument), *flags(tmp_path)], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
                          check=False)


def flags(tmp_path: Path) -> list[str]:
    return ["--data_root", str(tmp_path / "data"), "--raw_dir", str(tmp_path / "raw")]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    return contents(run(tmp_path_factory.mktemp("undisturbed"), EVENTS, minimum=5).folder)


@pytest.mark.slow
@pytest.mark.parametrize("point", [0, 1, 4, 6])  # the work; items; users' meta; the interactions' meta, the last one
def test_a_killed_run_leaves_nothing_that_counts_and_the_next_one_cleans_up_and_ends_the_same(tmp_path, undisturbed,
                                                                                              point):
    write_baby(tmp_path / "raw", EVENTS)
    folder = tmp_path / "data" / "Baby"
    assert python(KILLED, tmp_path, point).returncode == -signal.SIGKILL
    options = make_options(tmp_path / "data", *flags(tmp_path))
    if point == 0:
        assert left(folder) == {".work"}
    if point < 6:
        with pytest.raises((DataError, ArtifactError)):
            load_interactions(options.folder)
    else:
        assert load_meta(options.folder.interactions, "")["num_users"] == 30  # a reader gives it its meta
    process(options, COMMAND)
    assert contents(options.folder) == undisturbed
    assert left(folder) == {*undisturbed, *(f"{name}.meta.json" for name in undisturbed)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_running_query_at_once_and_leaves_the_old_tables(tmp_path, number):
    options = run(tmp_path, EVENTS, minimum=5)
    before = contents(options.folder)
    write_baby(tmp_path / "raw", EVENTS[:-1])
    done = python(STOPPED, tmp_path, number)
    assert (done.returncode, done.stderr) == (
        128 + number, "error: interrupted. Fix: the same command again continues from here\n")
    assert contents(options.folder) == before
    assert ".work" not in left(options.folder.path)


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_the_old_tables(tmp_path):
    options = run(tmp_path, EVENTS, minimum=5)
    before = contents(options.folder)
    write_baby(tmp_path / "raw", EVENTS[:-1])
    done = python(LIMITED, tmp_path, 500)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(f"error: {options.folder.path}: the disk is full. ")
    assert done.stderr.endswith("Fix: free space there, then run the same command again\n")
    assert contents(options.folder) == before
    assert left(options.folder.path) == {*before, *(f"{name}.meta.json" for name in before)}


def test_too_little_memory_is_named_with_the_flag(tmp_path):
    with pytest.raises(ResourceError) as error:
        run(tmp_path, EVENTS, "--memory_limit", "10MB")
    assert error.value.exit_code == 5
    assert error.value.what == "10MB are not enough for this data set"
    assert error.value.fix == "a larger --memory_limit"
    assert left(tmp_path / "data" / "Baby") == set()


def test_a_second_process_on_the_same_data_set_is_told_who_works_there(tmp_path):
    options = run(tmp_path, EVENTS)
    before = contents(options.folder)
    write_baby(tmp_path / "raw", EVENTS[:-1])
    scratch = options.folder.path / ".work"
    scratch.mkdir()  # of the process that holds the folder
    with FolderLock(options.folder.path), pytest.raises(LockedError) as error:
        process(make_options(tmp_path / "data", *flags(tmp_path)), COMMAND)
    assert error.value.exit_code == 7
    assert f"is in use by process {os.getpid()} on " in str(error.value)
    assert scratch.exists()
    assert contents(options.folder) == before
