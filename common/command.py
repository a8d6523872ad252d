"""The entry point that all commands share: signals, exit codes, and errors printed as one line."""

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
# Without a handler, logging itself would print errors to stderr, in addition to `_report`.
log.addHandler(logging.NullHandler())

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WATCHED = "STEP_WATCHES"  # environment variable: descriptor of a pipe that closes when the parent process ends
SECONDS_OF_ONE_REQUEST = 0.5  # GNU timeout sends one signal twice: to its child and to the process group
SECONDS_FOR_FIRST = 5.0  # if the first process fails, torchrun ends the other processes within this time


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Return a JSON escape such as \\u00b1 for characters that the output encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end


codecs.register_error("json_escape", _escape)


class StopRequest:
    """Handles SIGINT and SIGTERM, the signals that ask this process to stop.

    Outside of `with stop_request:`, a signal raises Interrupted immediately. Inside the `with` block, the first signal
    only sets `requested` to True. The block must check `requested` regularly, save its state and raise Interrupted
    itself. A second signal raises Interrupted immediately, unless it is the same signal and arrives less than half a
    second after the first one; such a signal is ignored.
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
        """Let a stop signal raise Interrupted immediately, until the end of the `with` block.

        This also holds inside `with stop_request:`. If a stop was requested before the block, Interrupted is raised at
        the start of the block.
        """
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
    """Stop this process when the process at the other end of the pipe ends."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def errors_of_models() -> Iterator[None]:
    """Convert an exception of a model's code to a ConfigError. The error names the line and the method."""
    try:
        yield
    except (UserError, BrokenPipeError, ModuleNotFoundError):
        raise
    except Exception as error:
        location = _location_in_model(error)
        if (location is None or out_of_memory(error) or connection_lost(error)
                or getattr(error, "errno", 0) in FULL_DISK):
            raise
        where, method = location
        raise ConfigError(where, f"{method} raised {type(error).__name__}", _one_line(str(error)),
                          "correct the model; --debug shows the traceback") from error


def _location_in_model(error: Exception) -> tuple[str, str] | None:
    """Return `file:line` and `Class.method` of the model's code that raised the error.

    Returns None if the error does not come from a model.
    """
    if isinstance(error, SyntaxError) and error.filename in plug_in_files:
        return f"{error.filename}:{error.lineno}", "its import"
    frames = [(frame.f_code.co_filename, frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    # First look for code in a model's file, then for methods that a model inherits. The last entry is the innermost.
    own = [part for part in frames if part[0] in plug_in_files] or [
        part for part in frames if _file_of(part[1].f_locals.get("self")) in plug_in_files]
    if not own:
        return None
    file, frame, line = own[-1]
    name = frame.f_code.co_qualname
    return f"{file}:{line}", "its import" if name == "<module>" else name


def _file_of(value: object) -> str | None:
    """Return the file that defines the class of `value`, or None if the file is not known."""
    return getattr(sys.modules.get(type(value).__module__), "__file__", None)


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return the exit code. An exception is printed as one line on stderr.

    In a torch.distributed process group, the function does not return. It ends the process with the exit code.
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
        sys.stdout.flush()  # flush inside the `try`: a full disk or a closed pipe raises here
        return 0
    except UserError as error:
        return _report(str(error), error.exit_code, argv)
    except Interrupted:
        command = "the same command without --force" if "--force" in argv else "the same command again"
        name = signal.Signals(stop_request.signal_number).name
        return _report(f"{name}: interrupted. Fix: run {command} to continue from here",
                       128 + stop_request.signal_number, argv, shared=True)
    except BrokenPipeError:
        # The program that reads our output (such as head) has ended, so a message is of no use.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        return _report(f"{sys.executable}: the package {error.name!r} is not installed. "
                       f"Fix: {environment_hint()}", 2, argv)
    except (MemoryError, RuntimeError) as error:
        if connection_lost(error):
            return _report("torchrun: another process of this job has ended or hangs. See the error message of that "
                           "process or of torchrun. Fix: run the same command again to continue from the last "
                           "checkpoint", 5, argv, shared=True)
        if not out_of_memory(error):
            raise
        return _report("memory: not enough memory. Fix: use a smaller batch_size or a machine with more memory", 5,
                       argv)
    except OSError as error:
        if error.errno in FULL_DISK:
            return _report(f"{error.filename or 'disk'}: {error.strerror}. Fix: free some disk space and run the "
                           "same command again", 5, argv)
        return _report(f"{error.filename or 'system'}: {error.strerror or error}. Fix: check the path and its "
                       "permissions", 2, argv)


def environment_hint() -> str:
    """Return the command that installs the packages of this project or activates its environment."""
    root = Path(__file__).resolve().parents[1]
    activate = root / ".venv" / "bin" / "activate"
    # If .venv is already active, a package is missing in it. Then setup.sh installs the package.
    found = activate.exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve()
    return f"source {activate if found else root / 'setup.sh'}"


def _report(message: str, code: int, argv: list[str], shared: bool = False) -> int:
    """Log and print an error, and return `code`.

    `shared` means that all processes have this error. Only the first process then prints it.
    """
    message = mask_secrets(message)
    log.error("error: %s", message)
    log.debug("%s", traceback.format_exc())
    if shared and not is_main():
        return code
    _wait_for_first()
    if "--debug" in argv:
        print(mask_secrets(traceback.format_exc()), end="", file=sys.stderr)
    print(f"error: {_prefix()}{_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _wait_for_first() -> None:
    """Make every process except the first wait before it prints an error."""
    # If all processes have the same error, torchrun ends the others while they wait, so the error is printed once.
    if not is_main():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_FIRST)


def _prefix() -> str:
    return "" if is_main() else f"process {rank()}: "


def _one_line(text: str) -> str:
    return " ".join(map(str.strip, text.splitlines()))


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected exception as one line. Write the traceback to run.log, and with --debug also to stderr."""
    log.error("internal error", exc_info=(kind, error, trace))
    _wait_for_first()
    fix = "run again with --debug and report the traceback"
    if "--debug" in sys.argv:
        print(mask_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
        fix = "report the traceback above"
    print(f"error: {_prefix()}internal: {kind.__name__}: {_one_line(mask_secrets(str(error)))}. Fix: {fix}",
          file=sys.stderr, flush=True)
