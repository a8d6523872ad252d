"""Steps that run one after another, each in its own process: order, exit codes, and forwarded signals."""

import fcntl
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from common.cli import ROOT
from common.steps import Step, StepKilled, module, run_steps, script
from tests.common.helpers import assert_interrupted
from tests.errors import Outcome, refused

pytestmark = pytest.mark.slow


def writes(path: Path, text: str) -> list[str]:
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})"]


def test_steps_run_in_order_and_log_their_seconds(tmp_path, caplog):
    caplog.set_level("INFO")
    run_steps([Step("first", writes(tmp_path / "file", "1")), Step("second", writes(tmp_path / "file", "2"))])
    assert (tmp_path / "file").read_text() == "12"
    assert {record.levelname for record in caplog.records} == {"INFO"}
    begun_1, ended_1, begun_2, ended_2, total = [record.getMessage() for record in caplog.records]
    for begun, ended, count, title in ((begun_1, ended_1, "1/2", "first"), (begun_2, ended_2, "2/2", "second")):
        assert count in begun
        assert title in begun
        assert count in ended
        assert re.search(r"\b\d+ s", ended.replace(count, ""))
    assert re.search(r"\b\d+ s", total)


@pytest.mark.parametrize(("code", "left_with"), [("sys.exit(3)", 3), ("sys.exit(7)", 7), ("1 / 0", 1)])
def test_a_failing_step_ends_the_job_with_its_code(tmp_path, code, left_with):
    failing = Step("fails", [sys.executable, "-c", f"import os, sys; sys.stderr = open(os.devnull, 'w'); {code}"])
    with pytest.raises(SystemExit) as raised:
        run_steps([failing, Step("never", writes(tmp_path / "file", "x"))])
    assert raised.value.code == left_with
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV", "SIGRTMIN"])
def test_a_killed_step_is_named_with_its_signal(tmp_path, name):
    number = getattr(signal, name)
    killed = [sys.executable, "-c", f"import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
                                    f"os.kill(os.getpid(), {number})"]
    with refused(StepKilled, "step 2/3", names=["'data: images'", name]) as raised:
        run_steps([Step("first", writes(tmp_path / "first", "1")), Step("data: images", killed),
                   Step("never", writes(tmp_path / "file", "x"))])
    assert raised.value.exit_code == 128 + number
    assert (raised.value.why != "") == (name != "SIGRTMIN")
    assert not (tmp_path / "file").exists()


def test_a_killed_step_ends_the_command_with_its_signal(start):
    process = start(job("import os; os.kill(os.getpid(), 9)"))
    _out, err = process.communicate(timeout=20)
    error = Outcome(process.returncode, "", err).error
    assert process.returncode == 137
    assert (error.where, "SIGKILL" in error.what, "batch_size" in error.fix) == ("step 1/2", True, True)


def test_modules_and_scripts_run_from_this_checkout(tmp_path, monkeypatch, capfd):
    decoy = tmp_path / "common"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('a decoy ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "further"))
    (tmp_path / "requirements.txt").write_text("no-such-package\n")
    with pytest.raises(SystemExit):
        run_steps([Step("module", module("common.environment", "requirements.txt"))])
    assert capfd.readouterr() == ("no-such-package\n", "")
    assert script("quantization/main.py", "--x") == [sys.executable, str(ROOT / "quantization/main.py"), "--x"]


def test_the_users_import_path_comes_after_this_checkout(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_steps([Step("path", [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])"])])
    assert capfd.readouterr().out == f"{ROOT}:{tmp_path}\n"


# A step that records every signal and ends a second after the first one.
NOTES = """
import os, signal, sys, time
file = open(sys.argv[1], "w")
def note(number, frame):
    file.write(f"{number} ")
    file.flush()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, note)
file.write("started ")
file.flush()
while file.tell() == len("started "):
    time.sleep(0.02)
time.sleep(1)
"""
# A step that counts on, and saves when it is asked to stop.
COUNTS = """
import sys, time
from common.command import run_command, stop_request
from common.errors import Interrupted
def main(argv):
    count = 0
    with open(argv[0], "w") as file, stop_request:
        while not stop_request.requested or argv[1:] == ["stubborn"]:
            count += 1
            file.write(f"{count} ")
            file.flush()
            time.sleep(0.02)
        file.write("saved")
    raise Interrupted()
sys.exit(run_command(main))
"""
JOB = """
import sys
from common.command import run_command
from common.steps import Step, run_steps
def main(argv):
    run_steps([Step("step", [sys.executable, "-c", *argv]), Step("never", [sys.executable, "-c", "1 / 0"])])
sys.exit(run_command(main))
"""


def job(*arguments: object) -> list[str]:
    """A command that runs `python -c arguments` as its first step."""
    return [sys.executable, "-c", JOB, *map(str, arguments)]


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture
def start():
    """Starts a command as the leader of a session; `terminal` becomes its terminal."""
    started = []

    def run(command: list[str], terminal: int | None = None) -> subprocess.Popen:
        def prepare() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under `nohup`
            if terminal is not None:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        streams = {} if terminal is None else {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        started.append(subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                        preexec_fn=prepare, **{"stderr": subprocess.PIPE, "text": True, **streams}))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def terminal():
    """The two ends of a pseudo-terminal: the user's and the process's."""
    user, process = pty.openpty()
    yield user, process
    os.close(user)
    os.close(process)


@pytest.mark.parametrize(("send", "number"), [
    (os.kill, signal.SIGINT), (os.kill, signal.SIGTERM), (os.kill, signal.SIGHUP),
    (os.killpg, signal.SIGINT), (os.killpg, signal.SIGTERM)])
def test_a_step_receives_each_signal_once(start, tmp_path, send, number):
    process = start(job(NOTES, tmp_path / "file"))
    wait_for(lambda: text(tmp_path / "file"))
    send(process.pid, number)
    _out, err = process.communicate(timeout=20)
    assert text(tmp_path / "file") == f"started {number} "
    if number != signal.SIGHUP:  # not a request to stop: this step succeeds, and the next one fails
        assert process.returncode == 128 + number
        assert_interrupted(err)


def test_a_key_of_the_terminal_reaches_a_step_once(start, terminal, tmp_path):
    process = start(job(NOTES, tmp_path / "file"), terminal[1])
    wait_for(lambda: text(tmp_path / "file"))
    os.write(terminal[0], b"\x03")
    assert process.wait(timeout=20) == 130
    assert text(tmp_path / "file") == "started 2 "


def test_a_second_key_ends_a_step_that_does_not_stop(start, terminal, tmp_path):
    process = start(job(COUNTS, tmp_path / "file", "stubborn"), terminal[1])
    wait_for(lambda: text(tmp_path / "file"))
    os.write(terminal[0], b"\x03")
    time.sleep(1)
    assert process.poll() is None
    os.write(terminal[0], b"\x03")
    assert process.wait(timeout=20) == 130
    assert "saved" not in text(tmp_path / "file")


def test_a_suspended_job_stops_and_continues_in_the_foreground(start, terminal, tmp_path):
    shell = start(["bash", "--norc", "--noprofile", "-i"], terminal[1])
    os.write(terminal[0], f"stty tostop; {shlex.join(job(COUNTS, tmp_path / 'file'))}; exit $?\n".encode())
    wait_for(lambda: text(tmp_path / "file"))
    os.write(terminal[0], b"\x1a")
    time.sleep(1)
    rested = text(tmp_path / "file")
    time.sleep(0.5)
    assert text(tmp_path / "file") == rested
    os.write(terminal[0], b"fg; exit $?\n")
    wait_for(lambda: len(text(tmp_path / "file")) > len(rested))
    os.write(terminal[0], b"\x03")
    assert shell.wait(timeout=20) == 130
    assert text(tmp_path / "file").endswith(" saved")


def test_a_step_saves_and_ends_when_its_job_is_killed(start, tmp_path):
    process = start(job(COUNTS, tmp_path / "file"))
    wait_for(lambda: text(tmp_path / "file"))
    process.kill()
    wait_for(lambda: text(tmp_path / "file").endswith(" saved"))
