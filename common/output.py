"""Standard output and standard error: encodings, control characters, and streams that are closed or full."""

import codecs
import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from common.errors import ResourceError

# All control characters except tab and line feed. A terminal would obey them, for example those in a title.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Return a JSON escape such as \\u00b1 for characters that the output encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end


codecs.register_error("json_escape", _escape)


def prepare_streams() -> None:
    """Open the standard streams that the caller has closed, and escape characters that their encodings do not have.

    If standard output was closed, writing to it fails. If standard error was closed, its text is lost.
    """
    # If a stream stayed closed, the next file that is opened would get its descriptor. Libraries that write to standard
    # error would then write to this file.
    # The descriptor of standard output is read-only, so that writing fails.
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="json_escape")


def show(text: str, stream: IO[str] | None = None, end: str = "\n") -> None:
    """Print a text on standard output, or on another stream. On a terminal, control characters are shown as escapes.

    Raises ResourceError if the text cannot be written, for example because the disk is full.
    """
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        text = CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    with _written(stream):
        stream.write(text + end)


def flush(stream: IO[str]) -> None:
    """Write the buffered text of a stream. Raises ResourceError if it cannot be written."""
    with _written(stream):
        stream.flush()


@contextmanager
def _written(stream: IO[str]) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # not a failure: the program that reads the output, such as head, has ended
        raise
    except OSError as error:
        discard(stream)
        name = "standard error" if stream is sys.stderr else "standard output"
        closed = error.errno == errno.EBADF
        raise ResourceError(name, "is closed" if closed else f"cannot be written: {error.strerror}", fix="run the "
                            "command without >&-" if closed else "free some disk space, or write the output to "
                            "another file or device") from error


def discard(stream: IO[str]) -> None:
    """Drop the buffered text and all later text of a stream. Otherwise, Python's shutdown would try to write it."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
