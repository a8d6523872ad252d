"""The entry point that all commands share: signals, exit codes, and errors printed as one line."""

import atexit
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from common.distributed import connection_lost, end_process, has_process_group, is_main, rank, world_size
from common.errors import ConfigError, Interrupted, ResourceError, UserError, mask_secrets, one_line
from common.machine import machine_error, require_memory
from common.output import discard, flush, prepare_streams, show
from common.registry import plug_in_files

log = logging.getLogger(__name__)
# Without a handler, logging itself would print errors to stderr, in addition to `_report`.
log.addHandler(logging.NullHandler())

WATCHED = "STEP_WATCHES"  # environment variable: descriptor of a pipe that closes when the parent process ends
SECONDS_OF_ONE_REQUEST = 0.5  # GNU timeout sends one signal twice: to its child and to the process group
SECONDS_FOR_FIRST = 5.0  # if the first process fails, torchrun ends the other processes within this time
NEW_OBJECTS = 10_000  # how many new objects start the garbage collector; the default of Python is 700 to 2,000


class StopRequest:
    """A handler of SIGINT and SIGTERM, the signals that ask this process to stop.

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
        if location is None or connection_lost(error) or isinstance(machine_error(error), ResourceError):
            raise
        where, method = location
        raise ConfigError(where, f"{method} raised {type(error).__name__}", one_line(str(error)),
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
    _collect_less_garbage()
    stop_request.install()
    prepare_streams()
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


def _collect_less_garbage() -> None:
    """Run the garbage collector less often, and not at the end of the process.

    With PyTorch, the last collection takes half a second, but the system frees the memory anyway. Collections during
    the imports find no garbage.
    """
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)


def _exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        require_memory()
        _require_folder()
        with errors_of_models():
            try:
                main(argv)
            except SystemExit as ended:  # --help ends with code 0
                if ended.code:
                    raise
        flush(sys.stdout)  # inside the `try`: a full disk or a closed pipe raises here
        return 0
    except UserError as error:
        return _report(str(error), error.exit_code, argv)
    except Interrupted:
        return _report(_interruption(argv), 128 + stop_request.signal_number, argv, shared=True)
    except BrokenPipeError:
        # The program that reads our output (such as head) has ended, so a message is of no use.
        discard(sys.stdout)
        return 141
    except Exception as error:
        if isinstance(error, RuntimeError) and connection_lost(error):
            return _report("torchrun: another process of this job has ended or hangs. See the error message of that "
                           "process or of torchrun. Fix: run the same command again to continue from the "
                           "results that are saved", 5, argv, shared=True)
        if (problem := machine_error(error)) is None:
            raise
        return _report(str(problem), problem.exit_code, argv)


def _interruption(argv: list[str]) -> str:
    command = "the same command without --force" if "--force" in argv else "the same command again"
    why = "interrupted" if world_size() == 1 else "interrupted; if another process has failed, see its error message"
    return f"{signal.Signals(stop_request.signal_number).name}: {why}. Fix: run {command} to continue from here"


def _require_folder() -> None:
    """Raise ConfigError if the current folder has been deleted. Libraries would fail there, some with exit code 2."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("current folder", "has been deleted", f"{error.strerror}: {os.getenv('PWD', '')}",
                          "change to an existing folder with cd, and run the same command again") from error


def _report(message: str, code: int, argv: list[str], shared: bool = False) -> int:
    """Log and print an error, and return `code`.

    `shared` means that all processes have this error. Only the first process then prints it.
    """
    message, trace = mask_secrets(message), traceback.format_exc()
    with suppress(OSError):  # the disk of run.log may be full
        log.error("error: %s", message)
        log.debug("%s", trace)
    if shared and not is_main():
        return code
    _wait_for_first()
    _print_error(message, trace if "--debug" in argv else "")
    return code


def _print_error(message: str, trace: str = "") -> None:
    """Print a traceback and an error message. If standard error cannot be written, they are lost."""
    with suppress(ResourceError, BrokenPipeError):
        show(mask_secrets(trace) + f"error: {_prefix()}{one_line(message, len(message))}", sys.stderr)
        flush(sys.stderr)


def _wait_for_first() -> None:
    """Make every process except the first wait before it prints an error."""
    # If all processes have the same error, torchrun ends the others while they wait, so the error is printed once.
    if not is_main():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_FIRST)


def _prefix() -> str:
    return "" if is_main() else f"process {rank()}: "


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected exception as one line. Write the traceback to run.log, and with --debug also to stderr."""
    with suppress(OSError):
        log.error("internal error", exc_info=(kind, error, trace))
    _wait_for_first()
    shown = "".join(traceback.format_exception(kind, error, trace)) if "--debug" in sys.argv else ""
    fix = "report the traceback above" if shown else "run again with --debug and report the traceback"
    _print_error(f"internal: {kind.__name__}: {mask_secrets(str(error))}. Fix: {fix}", shown)


def report_failed_imports() -> None:
    """Print errors of the machine and stop signals on one line from now on, even outside of `run_command`.

    Call this function before the first import that takes long or may fail, for example because the memory is full.
    """
    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, Interrupted):
            _print_error(_interruption(sys.argv))
            os._exit(128 + stop_request.signal_number)
        problem = error if isinstance(error, UserError) else machine_error(error)
        if problem is None:
            sys.__excepthook__(kind, error, trace)
        else:
            _print_error(str(problem))
            os._exit(problem.exit_code)

    stop_request.install()
    prepare_streams()
    sys.excepthook = report
    require_memory()
