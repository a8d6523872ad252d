"""User errors and what they name: the nearest name that exists, and no secret."""

import re
from collections.abc import Sequence
from difflib import get_close_matches


class UserError(Exception):
    """A fault that the user can mend, printed as `error: where: what. why. Fix: fix`."""

    exit_code = 2

    def __init__(self, where: object, what: str, why: str = "", fix: str = ""):
        self.where, self.what, self.why, self.fix = where, what, why, fix
        sentences = [f"{where}: {what}"] + ([why] if why else [])
        ended = [s if s.endswith("?") else s.rstrip(".") + "." for s in sentences]
        super().__init__(" ".join([*ended, "Fix: " + (fix or "see --help")]))


class ConfigError(UserError):
    """A wrong flag, key or name."""

    exit_code = 2


class DataError(UserError):
    """Input data that cannot be used."""

    exit_code = 3


class ArtifactError(UserError):
    """An artifact that is stale, foreign or damaged."""

    exit_code = 4


class ResourceError(UserError):
    """Disk, memory or network ran out."""

    exit_code = 5


class TrainingError(UserError):
    """Training left the finite numbers."""

    exit_code = 6


class LockedError(UserError):
    """Another process works in the same folder."""

    exit_code = 7


class Interrupted(BaseException):
    """Raised by whoever honoured a request to stop; exits with 128 + the signal's number.

    Like KeyboardInterrupt no Exception, which a library that it passes through might swallow.
    """


URL = re.compile(r"(?P<begin>[A-Za-z][\w+.-]*://|\burl: /)(?P<user>[^\s/?#'\"]*@)?(?P<path>[^\s?#'\"]*)"
                 r"(?P<query>\?[^\s#'\"]*)?")


def mask_secrets(text: str) -> str:
    """The text with `***` for the user's name and password, and for the values of the query, in every URL."""
    def masked(url: re.Match) -> str:
        query = re.sub(r"=[^&]*", "=***", url["query"] or "")
        return f"{url['begin']}{'***@' if url['user'] else ''}{url['path']}{query}"

    return URL.sub(masked, text)


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that was probably meant; None if none is like it."""
    # A case or punctuation slip scores low on short names; compare those by letters alone.
    letters, plain = _letters(name), {_letters(k): k for k in known}
    close = [plain[letters]] if letters in plain else get_close_matches(name, known, n=1, cutoff=0.5)
    close = close or [plain[p] for p in get_close_matches(letters, plain, n=1)]
    return close[0] if close else None


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?` or the list of what there is."""
    if (close := closest(name, known)) is not None:
        return f"did you mean {close!r}?"
    return "there are: " + (", ".join(sorted(known)) or "none")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def out_of_memory(error: Exception) -> bool:
    """Torch raises its OutOfMemoryError on a GPU, and a bare RuntimeError on the CPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        "can't allocate memory" in str(error))
