"""Output streams that are closed, full or terminals."""

import errno
import io
import os

import pytest

from common.errors import ConfigError, ResourceError
from common.output import flush, show
from tests.errors import Outcome, refused


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[31mred\x1b[0m", r"\u001b[31mred\u001b[0m"), ("a\rb\x08c\x7f", r"a\u000db\u0008c\u007f"),
    ("\x9b2Jx\x85", r"\u009b2Jx\u0085"), ("a\tb\nc", "a\tb\nc"), ("Zoë 日本 😀 שלום", "Zoë 日本 😀 שלום")])
def test_control_characters_are_escaped_on_a_terminal_alone(text, shown):
    terminal, file = Terminal(), io.StringIO()
    show(text, terminal)
    show(text, file, end="")
    assert (terminal.getvalue(), file.getvalue()) == (f"{shown}\n", text)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EBADF])
def test_output_that_cannot_be_written_is_a_resource_error(number):
    class Broken(io.StringIO):
        def write(self, *_):
            raise OSError(number, os.strerror(number))

        flush = write

    for write in (lambda: show("x", Broken()), lambda: flush(Broken())):
        with refused(ResourceError, "standard output"):
            write()


def test_a_pipe_without_a_reader_stays_a_broken_pipe():
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        show("x", Broken())


WAYS = {"print": "print('x')",
        "log": "from common.run import log_to_console\nlog_to_console()\nlogging.getLogger('common').info('x')",
        "help": "from common.cli import Parser\nParser().parse_args(['--help'])"}


@pytest.mark.slow
@pytest.mark.parametrize("body", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("stdout", ["/dev/full", "closed"])
def test_a_result_that_is_not_written_exits_with_5(command, monkeypatch, body, stdout):
    monkeypatch.setenv("PYTHONUNBUFFERED", "")  # with a buffer, the last chance to notice is the end of the process
    if stdout == "closed":
        done = command(body, preexec_fn=lambda: os.close(1))
    else:
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = command(body, stdout=full)
    Outcome(done.returncode, "", done.stderr).check_error(ResourceError, "standard output")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["/dev/full", "closed"])
def test_an_error_never_goes_to_standard_output(command, stderr):
    body = "raise DataError('here', 'is wrong')"
    if stderr == "closed":
        done = command(body, preexec_fn=lambda: os.close(2))
    else:
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = command(body, stderr=full)
    assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.slow
def test_a_file_never_takes_the_number_of_a_closed_stream(command, tmp_path):
    done = command("file = open(argv[0], 'w')\nos.write(2, b'noise of a library')\nprint(file.fileno() > 2)",
                   tmp_path / "artifact", preexec_fn=lambda: os.closerange(0, 1) or os.close(2))
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert (tmp_path / "artifact").read_bytes() == b""


@pytest.mark.slow
def test_a_full_disk_of_the_log_exits_with_5(command):
    done = command("from common.run import log_to, log_to_console\nlog_to_console()\nlog_to(Path('/dev/full'))\n"
                   "logging.getLogger('common').debug('x')")
    Outcome(done.returncode, done.stdout, done.stderr).check_error(ResourceError, "/dev/full")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_deleted_working_folder_is_named(command, tmp_path):
    (tmp_path / "gone").mkdir()
    done = command("print('not reached')", cwd=tmp_path / "gone", preexec_fn=lambda: os.rmdir(tmp_path / "gone"))
    Outcome(done.returncode, done.stdout, done.stderr).check_error(ConfigError, "current folder", fix=["cd"])
    assert done.stdout == ""


@pytest.mark.slow
def test_a_memory_fault_before_a_stage_command_exits_with_5(python):
    # As in `python -m dataloader.process`: the first import is the package, and a later import fails.
    done = python("import sys\nsys.argv[0] = '-m'\nimport dataloader\n"
                  "raise ImportError('libx.so: failed to map segment from shared object', name='numpy')")
    Outcome(done.returncode, done.stdout, done.stderr).check_error(ResourceError, "memory")
