"""Steps that run one after another, each a process of its own: order, exit codes, and how a stop is handed on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cli import ROOT
from common.steps import Step, module, run_steps, script


def writes(path: Path, text: str) -> list[str]:
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})"]


def test_steps_run_in_their_order_and_say_how_long_they_took(tmp_path, caplog):
    caplog.set_level("INFO")
    run_steps([Step("first", writes(tmp_path / "file", "1")), Step("second", writes(tmp_path / "file", "2"))])
    assert (tmp_path / "file").read_text() == "12"
    messages = [record.message for record in caplog.records]
    assert [messages[0], messages[2]] == ["[1/2] first", "[2/2] second"]
    assert messages[1].startswith("[1/2] took 0 s")
    assert messages[-1] == "all done in 0 s"


@pytest.mark.parametrize(("code", "left_with"), [("sys.exit(3)", 3), ("sys.exit(7)", 7), ("1 / 0", 1),
                                                 ("os.kill(os.getpid(), 9)", 137), ("os.kill(os.getpid(), 15)", 143)])
def test_the_first_step_that_fails_ends_the_job_with_its_own_exit_code(tmp_path, code, left_with):
    failing = Step("fails", [sys.executable, "-c", f"import os, sys; sys.stderr = open(os.devnull, 'w'); {code}"])
    with pytest.raises(SystemExit) as raised:
        run_steps([failing, Step("never", writes(tmp_path / "file", "x"))])
    assert raised.value.code == left_with
    assert not (tmp_path / "file").exists()


def test_a_module_runs_the_code_of_this_checkout_and_a_script_its_own_file(tmp_path, monkeypatch, capfd):
    decoy = tmp_path / "common"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('a decoy ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "further"))
    run_steps([Step("module", module("common.environment", str(ROOT / "requirements.txt")))])
    assert capfd.readouterr().out == "satisfied\n"
    assert script("quantization/main.py", "--x") == [sys.executable, str(ROOT / "quantization/main.py"), "--x"]


def test_the_users_own_path_stays_behind_that_of_this_checkout(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_steps([Step("path", [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])"])])
    assert capfd.readouterr().out == f"{ROOT}:{tmp_path}\n"


WAITS = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path({file!r}).write_text(f"stopped by {{number}}")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
Path({started!r}).touch()
time.sleep(60)
"""
JOB = """
import sys
sys.path.insert(0, sys.argv[1])
from common.errors import run_command
from common.steps import Step, run_steps
def main(argv):
    run_steps([Step("waits", [sys.executable, "-c", sys.argv[2]]), Step("never", [sys.executable, "-c", "1 / 0"])])
sys.exit(run_command(main, []))
"""


def test_a_stop_is_handed_on_to_the_step_which_can_save_and_no_other_is_begun(tmp_path):
    file, started = tmp_path / "file", tmp_path / "started"
    waits = WAITS.format(file=str(file), started=str(started))
    process = subprocess.Popen([sys.executable, "-c", JOB, str(ROOT), waits], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert file.read_text() == "stopped by 15"
    assert err == "error: interrupted. Fix: the same command again continues from here\n"
