import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from common.command import StopRequest, run_command, stop_request
from common.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    Interrupted,
    LockedError,
    ResourceError,
    TrainingError,
)
from common.machine import environment_hint
from tests.common.conftest import ROOT
from tests.common.helpers import assert_interrupted
from tests.errors import Outcome

CODES = {ConfigError: 2, DataError: 3, ArtifactError: 4, ResourceError: 5, TrainingError: 6, LockedError: 7}


@pytest.fixture
def outcome(capsys):
    """Runs a `main(argv)` in this process; how the command ended."""
    def run(main, argv: tuple[str, ...] = ()) -> Outcome:
        return Outcome(run_command(main, list(argv)), *capsys.readouterr())
    return run


def fails_with(error: BaseException):
    def main(argv):
        raise error
    return main


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_each_kind_of_error_has_its_exit_code(outcome, kind, code):
    ended = outcome(fails_with(kind("here", "is wrong", "That is why", "mend it")))
    assert ended == (code, "", "error: here: is wrong. That is why. Fix: mend it\n")


def test_success_exits_with_0_in_silence(capsys):
    given = []
    assert run_command(given.extend, ["--a", "1"]) == 0
    assert given == ["--a", "1"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_command_prints_its_error_once(command):
    done = command("raise DataError('here', 'is wrong', fix='mend it')")
    assert done.returncode == 3
    assert (done.stdout, done.stderr) == ("", "error: here: is wrong. Fix: mend it\n")


@pytest.mark.slow
def test_a_traceback_is_printed_with_debug_alone(command):
    done = command("raise DataError('here', 'is wrong', fix='mend it')", "--debug")
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("\nerror: here: is wrong. Fix: mend it\n")


@pytest.mark.slow
def test_an_internal_error_exits_with_1_and_one_line(command):
    done = command("raise ValueError('shapes differ\\n  (3,) and (4,)')")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ")
    error = Outcome(done.returncode, done.stdout, done.stderr).error
    assert "ValueError: shapes differ (3,) and (4,)" in error.what
    assert "--debug" in error.fix


@pytest.mark.slow
def test_an_internal_error_shows_its_traceback_with_debug(command):
    done = command("raise ValueError('oops')", "--debug")
    trace, line = done.stderr.rstrip("\n").rsplit("\n", 1)
    assert done.returncode == 1
    assert trace.endswith("in main\nValueError: oops")
    assert line.startswith("error: ")
    assert "ValueError: oops" in line
    assert " Fix: " in line
    assert "--debug" not in line


@pytest.mark.slow
@pytest.mark.parametrize(("raised", "code"), [("DataError('here', 'is wrong')", 3), ("ValueError('oops')", 1)])
def test_the_traceback_always_goes_to_the_log(command, tmp_path, raised, code):
    done = command("from common.run import log_to, log_to_console\nlog_to_console()\nlog_to(Path(argv[0]))\n"
                   f"raise {raised}", tmp_path / "run.log")
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    log = (tmp_path / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "here: is wrong" in log or "ValueError: oops" in log


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_resource_error(outcome, number):
    ended = outcome(fails_with(OSError(number, os.strerror(number), "/data/x.npy")))
    ended.check_error(ResourceError, "/data/x.npy", names=[os.strerror(number)])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_is_really_full_is_a_resource_error(outcome):
    def main(argv):
        with open("/dev/full", "w", encoding="utf-8") as file:
            file.write("x")
    outcome(main).check_error(ResourceError, "disk", names=[os.strerror(errno.ENOSPC)])


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_no_output_fails_because_of_its_encoding(command, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    body = """from common.run import log_to, log_to_console
log_to_console()
log_to(Path(argv[0]))
log = logging.getLogger("common")
log.info("a \\u00b1 b")
log.warning("a \\u00d7 b")
print('{"title": "\\u00e9\\U0001f600"}')
raise DataError('\\u4e2d', 'is wrong', fix='mend it')"""
    done = command(body, tmp_path / "run.log")
    assert done.returncode == 3
    first, second = done.stdout.splitlines()
    assert first == r"a \u00b1 b"
    assert json.loads(second) == {"title": "é😀"}
    assert done.stderr == "a \\u00d7 b\nerror: \\u4e2d: is wrong. Fix: mend it\n"
    log = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "a ± b" in log
    assert "中" in log


def test_any_other_fault_of_the_system_names_its_file(outcome, tmp_path):
    outcome(lambda argv: os.mkdir(tmp_path)).check_error(ConfigError, tmp_path, names=[os.strerror(errno.EEXIST)])


def test_memory_that_runs_out_is_a_resource_error(outcome):
    for main in (fails_with(MemoryError()), lambda argv: torch.empty(2**60),
                 fails_with(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"))):
        outcome(main).check_error(ResourceError, "memory", fix=["batch_size"])


def test_other_errors_of_torch_stay_internal():
    with pytest.raises(RuntimeError) as raised:
        run_command(lambda argv: torch.ones(2) + torch.ones(3), [])
    assert type(raised.value) is RuntimeError


def test_a_missing_package_is_named_with_its_fix(outcome):
    def main(argv):
        import no_such_package.part  # noqa: F401
    ended = outcome(main)
    ended.check_error(ConfigError, sys.executable, names=["'no_such_package'"], fix=[environment_hint()])
    assert ended.err.count("\n") == 1


@pytest.mark.slow
def test_a_closed_output_ends_a_command_in_silence(command):
    read, write = os.pipe()
    os.close(read)
    done = command("print('x' * 100_000, flush=True)", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_command_at_once(command, name, code):
    done = command(f"os.kill(os.getpid(), signal.{name})\ntime.sleep(20)\nprint('still here')")
    assert (done.returncode, done.stdout) == (code, "")
    assert_interrupted(done.stderr)


@pytest.mark.parametrize("argv", [("--model=sasrec",), ("--model=sasrec", "--force")])
def test_an_interrupted_command_continues_without_force(outcome, monkeypatch, argv):
    monkeypatch.setattr(stop_request, "signal_number", signal.SIGTERM)
    ended = outcome(fails_with(Interrupted()), argv)
    assert (ended.code, ended.out) == (143, "")
    assert_interrupted(ended.err, names_force="--force" in argv)


@pytest.mark.slow
def test_no_library_can_swallow_an_interruption(command):
    # logging's handlers, among others, catch every Exception that reaches them.
    done = command("try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(20)\n"
                   "except Exception:\n    print('swallowed')")
    assert (done.returncode, done.stdout) == (143, "")


LOOP = """
with stop_request:
    os.kill(os.getpid(), signal.SIGTERM)
    print('before:', stop_request.requested, flush=True)
    {then}
    print('saved', flush=True)
    if stop_request.requested:
        raise Interrupted()
print('not reached')
"""


@pytest.mark.slow
def test_a_loop_that_defers_a_stop_can_save_first(command):
    done = command(LOOP.format(then="pass"))
    assert (done.returncode, done.stdout) == (143, "before: True\nsaved\n")


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_loop(command):
    done = command(LOOP.format(then="os.kill(os.getpid(), signal.SIGINT)"))
    assert (done.returncode, done.stdout) == (130, "before: True\n")


@pytest.mark.slow
def test_a_signal_repeated_at_once_is_one_request(command):
    done = command(LOOP.format(then="os.kill(os.getpid(), signal.SIGTERM)"))
    assert (done.returncode, done.stdout) == (143, "before: True\nsaved\n")


@pytest.mark.slow
def test_a_part_of_the_loop_can_stop_at_once(command):
    done = command("with stop_request:\n    with stop_request.at_once():\n"
                   "        os.kill(os.getpid(), signal.SIGTERM)\n        print('not reached')\n")
    assert (done.returncode, done.stdout) == (143, "")
    request = StopRequest()
    with request:
        with request.at_once():
            pass
        request._receive(signal.SIGTERM, None)  # deferred again
        with pytest.raises(Interrupted), request.at_once():
            pass


def test_after_the_loop_a_signal_stops_at_once_again():
    request = StopRequest()
    with request:
        pass
    with pytest.raises(Interrupted):
        request._receive(signal.SIGTERM, None)


def test_within_the_loop_the_first_signal_is_only_noted():
    request = StopRequest()
    with request:
        assert not request.requested
        request._receive(signal.SIGTERM, None)
        assert request.requested
        assert request.signal_number == signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(("module", "library"), [("dataloader.process", "duckdb"), ("recommendation.results", "numpy")])
def test_a_signal_during_the_imports_is_one_line(tmp_path, module, library):
    (tmp_path / f"{library}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-P", "-m", module], env={**os.environ, "PYTHONPATH": path}, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert_interrupted(done.stderr)
