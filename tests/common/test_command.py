import errno
import json
import os
import signal
import sys

import pytest
import torch

from common import command as frame
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

CODES = {ConfigError: 2, DataError: 3, ArtifactError: 4, ResourceError: 5, TrainingError: 6, LockedError: 7}


def exit_code(error: BaseException) -> int:
    def main(argv):
        raise error
    return run_command(main, [])


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_each_kind_of_error_has_its_exit_code(capsys, kind, code):
    assert exit_code(kind("here", "is wrong", "that is why", "mend it")) == code
    assert capsys.readouterr() == ("", "error: here: is wrong. that is why. Fix: mend it\n")


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
    done = command("raise DataError('here', 'is wrong')", "--debug")
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("\nerror: here: is wrong. Fix: see --help\n")


@pytest.mark.slow
def test_an_internal_error_exits_with_1_and_one_line(command):
    done = command("raise ValueError('shapes differ\\n  (3,) and (4,)')")
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "error: internal: ValueError: shapes differ (3,) and (4,). "
                                              "Fix: run again with --debug and report the traceback\n")


@pytest.mark.slow
def test_an_internal_error_shows_its_traceback_with_debug(command):
    done = command("raise ValueError('oops')", "--debug")
    assert done.returncode == 1
    assert 'in main\nValueError: oops\nerror: internal: ValueError: oops' in done.stderr
    assert "Fix: report the traceback above" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("raised", "code"), [("DataError('here', 'is wrong')", 3), ("ValueError('oops')", 1)])
def test_the_traceback_always_goes_to_the_log(command, tmp_path, raised, code):
    done = command("from common.run import log_to, log_to_console\nlog_to_console()\nlog_to(Path(argv[0]))\n"
                   f"raise {raised}", tmp_path / "run.log")
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    log = (tmp_path / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "error: here: is wrong" in log or "ValueError: oops" in log


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_resource_error(capsys, number):
    assert exit_code(OSError(number, os.strerror(number), "/data/x.npy")) == 5
    assert capsys.readouterr().err.startswith(f"error: /data/x.npy: {os.strerror(number)}. Fix: free space")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_is_really_full_is_a_resource_error(capsys):
    def main(argv):
        with open("/dev/full", "w", encoding="utf-8") as file:
            file.write("x")
    assert run_command(main, []) == 5
    assert "No space left on device" in capsys.readouterr().err


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
raise DataError('\\u4e2d', 'is wrong')"""
    done = command(body, tmp_path / "run.log")
    assert done.returncode == 3
    first, second = done.stdout.splitlines()
    assert first == r"a \u00b1 b"
    assert json.loads(second) == {"title": "é😀"}
    assert done.stderr == "a \\u00d7 b\nerror: \\u4e2d: is wrong. Fix: see --help\n"
    log = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "a ± b" in log
    assert "中" in log


def test_any_other_fault_of_the_system_names_its_file(capsys, tmp_path):
    assert run_command(lambda argv: os.mkdir(tmp_path), []) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path}: File exists. Fix: check the path and its permissions\n")


def test_memory_that_runs_out_is_a_resource_error(capsys):
    assert exit_code(MemoryError()) == 5
    assert exit_code(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")) == 5
    assert run_command(lambda argv: torch.empty(2**60), []) == 5
    assert capsys.readouterr().err.count("error: memory") == 3


def test_other_errors_of_torch_stay_internal():
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_command(lambda argv: torch.ones(2) + torch.ones(3), [])


def test_a_missing_package_is_named_with_the_way_to_get_it(capsys):
    def main(argv):
        import no_such_package.part  # noqa: F401
    assert run_command(main, []) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {sys.executable}: the package 'no_such_package' is not installed. Fix: source ")
    assert line.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_has_left_is_told_nothing(command):
    read, write = os.pipe()
    os.close(read)
    done = command("print('x' * 100_000, flush=True)", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_command_at_once(command, name, code):
    done = command(f"os.kill(os.getpid(), signal.{name})\ntime.sleep(20)\nprint('still here')")
    assert done.returncode == code
    assert (done.stdout, done.stderr) == ("", "error: interrupted. Fix: the same command again continues from here\n")


def test_an_interrupted_repetition_is_not_begun_anew(capsys, monkeypatch):
    def main(argv):
        raise Interrupted()

    monkeypatch.setattr(stop_request, "signal_number", signal.SIGTERM)
    assert run_command(main, ["--model=sasrec", "--force"]) == 143
    assert "Fix: the same command without --force continues from here" in capsys.readouterr().err


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
def test_a_signal_that_is_repeated_at_once_is_one_request(command):
    done = command(LOOP.format(then="os.kill(os.getpid(), signal.SIGTERM)"))
    assert (done.returncode, done.stdout) == (143, "before: True\nsaved\n")


@pytest.mark.slow
def test_a_part_of_the_loop_may_be_left_at_once(command):
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


def test_after_the_loop_a_signal_counts_at_once_again():
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


def test_the_hint_prefers_an_environment_that_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(frame, "__file__", str(tmp_path / "common" / "command.py"))
    assert frame.environment_hint() == f"source {tmp_path / 'setup.sh'}"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert frame.environment_hint() == f"source {tmp_path / '.venv' / 'bin' / 'activate'}"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))  # which is active, and lacks the package
    assert frame.environment_hint() == f"source {tmp_path / 'setup.sh'}"
