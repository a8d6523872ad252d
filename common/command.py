"""The frame that every command runs in: signals, exit codes, and errors as one line."""

import codecs
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from common.distributed import connection_lost, end_process, has_process_group, is_main, rank
from common.errors import ConfigError, Interrupted, UserError, mask_secrets, out_of_memory
from common.registry import plug_in_files

log = logging.getLogger(__name__)
# Before a command sends its log anywhere, logging would print errors to stderr itself, a second time.
log.addHandler(logging.NullHandler())

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WATCHED = "STEP_WATCHES"  # the environment variable with the pipe that a job holds open for its step
SECONDS_OF_ONE_REQUEST = 0.5  # GNU timeout sends its signal twice: to its child, and to the group
SECONDS_FOR_FIRST = 5.0  # in which torchrun ends the other processes, if the first one has failed


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Write a character that the user's encoding lacks as \\u00b1, which is also valid in JSON."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end


codecs.register_error("json_escape", _escape)


class StopRequest:
    """SIGINT and SIGTERM: at once, or, inside `with stop_request:`, when the loop in there asks.

    A loop that defers a stop must ask `requested` regularly, save its state and raise Interrupted.
    A second signal does not wait for it, unless it repeats the first within a moment.
    """

    def __init__(self):
        self.signal_number = 0
        self._deferred = False
        self._received_at = 0.0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)
        if pipe := os.environ.pop(WATCHED, ""):
            threading.Thread(target=_stop_when_closed, args=(int(pipe),), daemon=True).start()

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    @contextmanager
    def at_once(self):
        """For what takes long in such a loop and may be left in the middle. A stop from before raises Interrupted."""
        deferred, self._deferred = self._deferred, False
        try:
            if self.requested:
                raise Interrupted()
            yield
        finally:
            self._deferred = deferred

    def _receive(self, number: int, frame: object) -> None:
        again, now = self.requested, time.monotonic()
        if again and number == self.signal_number and now - self._received_at < SECONDS_OF_ONE_REQUEST:
            return
        self.signal_number, self._received_at = number, now
        if again or not self._deferred:
            raise Interrupted()

    def __enter__(self):
        self._deferred = True
        return self

    def __exit__(self, *exc):
        self._deferred = False
stop_request = StopRequest()


def _stop_when_closed(pipe: int) -> None:
    """Stop this process when the one that holds the pipe open has ended."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def errors_of_models() -> Iterator[None]:
    """What a model raises, in whatever it is asked to do, becomes a ConfigError that names its line and method."""
    try:
        yield
    except (UserError, BrokenPipeError, ModuleNotFoundError):
        raise
    except Exception as error:
        place = _place_in_model(error)
        if place is None or out_of_memory(error) or connection_lost(error) or getattr(error, "errno", 0) in FULL_DISK:
            raise
        where, method = place
        raise ConfigError(where, f"{method} raised {type(error).__name__}", _one_line(str(error)),
                          "correct the model; --debug shows the traceback") from error


def _place_in_model(error: Exception) -> tuple[str, str] | None:
    """`file:line` and `Class.method` of the innermost frame in a model's own file, else of one of its objects."""
    if isinstance(error, SyntaxError) and error.filename in plug_in_files:
        return f"{error.filename}:{error.lineno}", "its import"
    frames = [(frame.f_code.co_filename, frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [part for part in frames if part[0] in plug_in_files] or [
        part for part in frames if _file_of(part[1].f_locals.get("self")) in plug_in_files]
    if not own:
        return None
    file, frame, line = own[-1]
    name = frame.f_code.co_qualname
    return f"{file}:{line}", "its import" if name == "<module>" else name


def _file_of(value: object) -> str | None:
    """The file of an object's class."""
    return getattr(sys.modules.get(type(value).__module__), "__file__", None)


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a command's `main(argv)` and turn what it raises into one line on stderr and an exit code.

    A process that is in a process group ends here, with that code.
    """
    argv = sys.argv[1:] if argv is None else argv
    stop_request.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="json_escape")
    sys.excepthook = _report_bug
    try:
        code = _exit_code(main, argv)
    except Exception as error:
        if not has_process_group():
            raise
        _report_bug(type(error), error, error.__traceback__)
        code = 1
    if has_process_group():
        end_process(code)
    return code


def _exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        with errors_of_models():
            main(argv)
        sys.stdout.flush()  # here, where a full disk and a reader that has left are reported
        return 0
    except UserError as error:
        return _report(str(error), error.exit_code, argv)
    except Interrupted:
        again = "the same command without --force" if "--force" in argv else "the same command again"
        return _report(f"interrupted. Fix: {again} continues from here",
                       128 + stop_request.signal_number, argv, shared=True)
    except BrokenPipeError:
        # The reader of our output (head, less) has left; nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        return _report(f"{sys.executable}: the package {error.name!r} is not installed. "
                       f"Fix: {environment_hint()}", 2, argv)
    except (MemoryError, RuntimeError) as error:
        if connection_lost(error):
            return _report("torchrun: another process of this job has ended or hangs. Its own message says why, or "
                           "torchrun's. Fix: the same command again continues from the last checkpoint", 5, argv,
                           shared=True)
        if not out_of_memory(error):
            raise
        return _report("memory: there is not enough of it. Fix: a smaller batch_size or a larger machine", 5, argv)
    except OSError as error:
        if error.errno in FULL_DISK:
            return _report(f"{error.filename or 'disk'}: {error.strerror}. Fix: free space there, then run the "
                           "same command again", 5, argv)
        return _report(f"{error.filename or 'system'}: {error.strerror or error}. Fix: check the path and its "
                       "permissions", 2, argv)


def environment_hint() -> str:
    """The command that gives this checkout a Python with all its packages."""
    root = Path(__file__).resolve().parents[1]
    activate = root / ".venv" / "bin" / "activate"
    # In an environment that is active already, it is the set-up that adds what is missing.
    found = activate.exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve()
    return f"source {activate if found else root / 'setup.sh'}"


def _report(message: str, code: int, argv: list[str], shared: bool = False) -> int:
    """`shared`: of several processes the first one has the same to say."""
    message = mask_secrets(message)
    log.error("error: %s", message)
    log.debug("%s", traceback.format_exc())
    if shared and not is_main():
        return code
    _leave_to_first()
    if "--debug" in argv:
        print(mask_secrets(traceback.format_exc()), end="", file=sys.stderr)
    print(f"error: {_prefix()}{_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _leave_to_first() -> None:
    """Wait before another process than the first speaks: a fault of all ends that one, and then torchrun this one."""
    if not is_main():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_FIRST)


def _prefix() -> str:
    return "" if is_main() else f"process {rank()}: "


def _one_line(text: str) -> str:
    return " ".join(map(str.strip, text.splitlines()))


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What no one foresaw (Python then exits with 1): the traceback to run.log, and with --debug to stderr."""
    log.error("internal error", exc_info=(kind, error, trace))
    _leave_to_first()
    fix = "run again with --debug and report the traceback"
    if "--debug" in sys.argv:
        print(mask_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
        fix = "report the traceback above"
    print(f"error: {_prefix()}internal: {kind.__name__}: {_one_line(mask_secrets(str(error)))}. Fix: {fix}",
          file=sys.stderr, flush=True)
