"""Exceptions for user errors, suggestions for misspelled names, masking of secrets, and detection of full memory."""

import errno
import re
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

MAX_TEXT = 4_000  # a message shows at most this many characters of a text
LONG_NAME = 200   # no known name is similar to a longer one


class UserError(Exception):
    """An error that the user can fix, printed as `error: where: what. why. Fix: fix`.

    where: a flag, a file or `file:line`
    what: the problem; begins with a lower-case letter
    why: a full sentence
    fix: a command or an instruction
    """

    exit_code = 2

    def __init__(self, where: object, what: str, why: str = "", fix: str = ""):
        self.where, self.what, self.why, self.fix = where, what, why, fix
        sentences = [one_line(f"{where}: {what}"), one_line(why)]
        ended = [s if s.endswith("?") else s.rstrip(".") + "." for s in sentences if s]
        super().__init__(" ".join([*ended, "Fix: " + (one_line(fix) or "see --help")]))

    def __reduce__(self):
        return type(self), (self.where, self.what, self.why, self.fix)  # otherwise, pickle would pass only the message


class ConfigError(UserError):
    """A flag, configuration key or name is wrong."""

    exit_code = 2


class DataError(UserError):
    """Input data is missing or cannot be used."""

    exit_code = 3


class ArtifactError(UserError):
    """An artifact is stale, is damaged, or was made for other data."""

    exit_code = 4


class ResourceError(UserError):
    """There is not enough disk space or memory, or the network failed."""

    exit_code = 5


class TrainingError(UserError):
    """A loss or metric became NaN or infinite during training."""

    exit_code = 6


class LockedError(UserError):
    """Another process is using the same folder."""

    exit_code = 7


class Interrupted(BaseException):
    """Raised to stop the command after SIGINT or SIGTERM. The exit code is 128 + the signal number."""

    # Not derived from Exception, so that a library's `except Exception` does not catch it.


NUM_NEIGHBORS = 500  # an unknown id is compared with this many ids before and after it in sorted order

# The name of the protocol is bounded: in a long text without spaces, the search would take quadratic time.
URL = re.compile(r"(?P<begin>[A-Za-z][\w+.-]{0,20}://|\burl: /)(?P<user>[^\s/?#'\"]*@)?(?P<path>[^\s?#'\"]*)"
                 r"(?P<query>\?[^\s#'\"]*)?")

OUT_OF_MEMORY = ("OutOfMemoryError", "OutOfMemoryException")  # the classes of PyTorch and DuckDB
# Parts of the messages of PyTorch, C++, CUDA, the operating system, the loader of libraries, and Python's threads.
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED",
             "failed to map segment", "cannot map zero-fill pages", "can't start new thread")


def one_line(text: str, limit: int = MAX_TEXT) -> str:
    """Return a text for a message as one line of at most `limit` characters.

    A text may come from a file. With a line break, it could look like another message.
    """
    text = " ".join(map(str.strip, text[:limit + 1].splitlines())).strip()
    return text if len(text) <= limit else f"{text[:limit]}…"


def mask_secrets(text: str) -> str:
    """Replace the user name, the password and the query values of every URL in the text by `***`."""
    def masked(url: re.Match) -> str:
        query = re.sub(r"=[^&]*", "=***", url["query"] or "")
        return f"{url['begin']}{'***@' if url['user'] else ''}{url['path']}{query}"

    return URL.sub(masked, text)


def closest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None if none is similar."""
    if len(name) > LONG_NAME:  # the comparison would take minutes
        return None
    # First compare only the letters and digits: in a short name, a wrong case or dash would make a big difference.
    letters, plain = _letters(name), {_letters(k): k for k in known}
    close = [plain[letters]] if letters in plain else get_close_matches(name, known, n=1, cutoff=0.7)
    # Next, names with an extra or a missing word, such as lr_rate for lr.
    close = close or [k for k in known if k and (name.startswith(f"{k}_") or k.startswith(f"{name}_"))][:1]
    close = close or get_close_matches(name, known, n=1, cutoff=0.5)
    close = close or [plain[p] for p in get_close_matches(letters, plain, n=1)]
    return close[0] if close else None


def nearest(name: str, known: Sequence[str]) -> str:
    """Return "Did you mean 'x'?" if a known name is similar to `name`, else the list "Known: a, b, c".

    The result is meant for the argument `why` of `UserError`.
    """
    if (close := closest(name, known)) is not None:
        return f"Did you mean {close!r}?"
    return "Known: " + (", ".join(sorted(known)) or "none")


def nearest_id(raw_id: str, known: Iterable[str]) -> tuple[str, str | None]:
    """Return a hint for an unknown id, and the most similar known id (or None).

    The hint is "Did you mean 'x'?", or the number and the range of the known ids if no id is similar.
    """
    # A comparison with all ids would be slow, so compare only with the nearest ids in sorted order.
    ordered = sorted(known, key=str.casefold)
    place = bisect(ordered, raw_id.casefold(), key=str.casefold)
    close = closest(raw_id, ordered[max(place - NUM_NEIGHBORS, 0):place + NUM_NEIGHBORS])
    if close is not None:
        return f"Did you mean {close!r}?", close
    return (f"Known: {len(ordered)} ids, from {ordered[0]!r} to {ordered[-1]!r}" if ordered else "Known: none"), None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether the error, or the error that caused it, was raised because there was not enough memory."""
    while error is not None:
        # PyTorch raises OutOfMemoryError on a GPU, but a plain RuntimeError on the CPU and in the CUDA libraries.
        if (isinstance(error, MemoryError) or type(error).__name__ in OUT_OF_MEMORY
                or getattr(error, "errno", None) == errno.ENOMEM or any(words in str(error) for words in NO_MEMORY)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming(path: object, size: int | None = None) -> Iterator[None]:
    """Add the path to an OSError that does not name a file, for example to the error of a full disk.

    size: the number of bytes of the whole file, for the error of a full disk
    """
    try:
        yield
    except OSError as error:
        if error.errno:
            error.filename = error.filename or str(path)
            if size is not None:
                error.add_note(f"{size:,} bytes are needed")
        raise
